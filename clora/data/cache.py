"""Tensors kept on disk under the hash of everything that they were made from; read again only if they are whole.

One safetensors file per entry. Its header holds the entry's key, as JSON, and the hash of its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from clora.errors import CloraError
from clora.files import write_atomic
from clora.hashing import canonical, digest, tensor_digest
from clora.progress import say

VERSION = 1
"""Raised whenever clora computes an entry otherwise than before."""

Entry = Mapping[str, Tensor]
Key = Mapping[str, object]
"""Everything that an entry is made from: JSON values, and hashes of large inputs."""
Layout = tuple[tuple[str, torch.dtype, torch.Size], ...]
"""Name, dtype and shape of each tensor of an entry, in order of the names."""
Make = Callable[[list[range]], Iterable[Entry]]


class Cache:
    """A folder of entries.

    Args:
        folder: created with the first entry; several runs may share it. None keeps entries in memory, for one run.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def entries(self, kind: str) -> Entries:
        """Entries of one kind, which names their subfolder; none yet."""
        return Entries(None if self.folder is None else self.folder / kind, kind)


class Entries(Sequence[Entry]):
    """Entries of a cache by position. Their tensors stay in their files, and are read whenever they are asked for.

    `extend` reads every file whole and compares its hash; later only shapes and dtypes are compared.
    """

    def __init__(self, folder: Path | None, kind: str):
        self._folder = folder
        self._kind = kind
        self._names: list[str] = []  # of each position; equal keys share one
        self._layouts: dict[str, Layout] = {}
        self._distinct: dict[Layout, Layout] = {}  # there are few, so that thousands of entries share them
        self._in_memory: dict[str, Entry] = {}  # without a folder

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, i: int) -> Entry:  # type: ignore[override]
        """Reads one entry. Raises CloraError if its file was removed or damaged after `extend`."""
        name = self._names[i]
        if self._folder is None:
            return self._in_memory[name]
        path = self._path(name)
        try:
            entry = load(path.read_bytes())
            found = "other tensors" if _layout(entry) != self._layouts[name] else None
        except OSError as error:
            found = error.strerror or str(error)
        except SafetensorError as error:
            found = str(error)
        if found is not None:
            raise CloraError(
                f"{path} is needed until the end of training and was removed or damaged meanwhile ({found}); start the same "
                "command again: it makes the file again and goes on from the last checkpoint"
            )
        return entry

    def layout(self, i: int) -> Layout:
        """Names, dtypes and shapes of one entry; no file is read."""
        return self._layouts[self._names[i]]

    def extend(self, keys: Sequence[Key], chunks: Sequence[range], describe: Callable[[int], str], make: Make) -> None:
        """Appends the entry of each key, read where the folder has it and made where it has not.

        A chunk is made whole, whatever is missing of it: entries that are computed in one batch round together, so that
        work that was interrupted ends with the bits of work that was not.

        Args:
            keys: one for each entry; equal keys share one.
            chunks: the positions among these keys that are computed together, in order; they cover all.
            describe: names the entry at a position, for messages.
            make: called with the chunks that have missing entries, unless all are found; yields the entries of all their
                positions. What is missing is written at once: work that is interrupted keeps what it had.

        Raises:
            CloraError: an entry is not finite, or cannot be written.
        """
        # Reading comes first and whole, so that ``make`` knows all that it has to do.
        names = [self._name(key) for key in keys]
        for name in dict.fromkeys(names):
            if name not in self._layouts:
                entry = self._read(name)
                if entry is not None and _is_finite(entry):
                    self._keep(name, entry)
        wanted = [chunk for chunk in chunks if any(names[i] not in self._layouts for i in chunk)]
        for i, entry in zip(chain(*wanted), make(wanted) if wanted else (), strict=True):
            if names[i] in self._layouts:
                continue
            if not _is_finite(entry):
                raise CloraError(
                    f"{describe(i)}: what the model makes of it has NaN or infinite values. Check the model's files and "
                    "the LoRA, or try dtype: float32"
                )
            self._write(names[i], keys[i], entry)
            self._keep(names[i], entry)
        self._names += names

    def _keep(self, name: str, entry: Entry) -> None:
        """Notes what a whole entry looks like; its tensors are kept only where there is no folder."""
        layout = _layout(entry)
        self._layouts[name] = self._distinct.setdefault(layout, layout)
        if self._folder is None:
            self._in_memory[name] = entry

    def _read(self, name: str) -> Entry | None:
        if self._folder is None or not self._path(name).exists():
            return None
        path = self._path(name)
        # Whatever the damage, a file cut short or another tool's, the entry is rebuilt.
        try:
            with safe_open(path, "pt") as file:
                entry = {part: file.get_tensor(part) for part in file.keys()}  # noqa: SIM118
                header = file.metadata()
            is_whole = header["sha256"] == tensor_digest(entry) and self._name(json.loads(header["key"])) == name
            if is_whole:
                return entry
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            pass
        say(f"{path} is damaged; rebuilding it")
        return None

    def _write(self, name: str, key: Key, entry: Entry) -> None:
        if self._folder is not None:
            header = {"key": canonical(key), "sha256": tensor_digest(entry)}
            content = save({part: tensor.contiguous() for part, tensor in entry.items()}, header)
            write_atomic(self._path(name), content)

    def _name(self, key: Key) -> str:
        return digest({"version": VERSION, "kind": self._kind, **key})

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def chunked(count: int, at_once: int, start: int = 0) -> list[range]:
    """Splits ``count`` positions from ``start`` on into chunks of ``at_once``, the last perhaps shorter."""
    return [range(i, min(i + at_once, start + count)) for i in range(start, start + count, at_once)]


def _layout(entry: Entry) -> Layout:
    return tuple((part, entry[part].dtype, entry[part].shape) for part in sorted(entry))


def _is_finite(entry: Entry) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in entry.values())
