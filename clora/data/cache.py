"""Tensors kept on disk under the hash of everything that they were made from; read again only if they are whole.

One safetensors file per entry. Its header holds the entry's key, as JSON, and the hash of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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
Make = Callable[[list[range]], Iterable[Entry]]


class Cache:
    """A folder of entries.

    Args:
        folder: created with the first entry; several runs may share it. None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def entries(
        self, kind: str, keys: Sequence[Key], chunks: Sequence[range], describe: Callable[[int], str], make: Make
    ) -> list[Entry]:
        """The entry of each key, read where the folder has it and made where it has not.

        A chunk is made whole, whatever is missing of it: entries that are computed in one batch round together, so that
        work that was interrupted ends with the bits of work that was not.

        Args:
            kind: the name of a subfolder.
            keys: one for each entry; equal keys share one.
            chunks: the positions that are computed together, in order; they cover all.
            describe: names the entry at a position, for messages.
            make: called with the chunks that have missing entries, unless all are found; yields the entries of all their
                positions. What is missing is written at once: work that is interrupted keeps what it had.

        Raises:
            CloraError: an entry is not finite, or cannot be written.
        """
        # Reading comes first and whole, so that ``make`` knows all that it has to do.
        names = [digest(key) for key in keys]
        found: dict[str, Entry] = {}
        for name, key in dict(zip(names, keys, strict=True)).items():
            entry = self._read(kind, key)
            if entry is not None and _is_finite(entry):
                found[name] = entry
        wanted = [chunk for chunk in chunks if any(names[i] not in found for i in chunk)]
        for i, entry in zip(chain(*wanted), make(wanted) if wanted else (), strict=True):
            if names[i] not in found:
                if not _is_finite(entry):
                    raise CloraError(
                        f"{describe(i)}: what the model makes of it has NaN or infinite values. Check the model's files and "
                        "the LoRA, or try dtype: float32"
                    )
                self._write(kind, keys[i], entry)
                found[names[i]] = entry
        return [found[name] for name in names]

    def _read(self, kind: str, key: Key) -> Entry | None:
        path = self._path(kind, key)
        if path is None or not path.exists():
            return None
        # Whatever the damage, a file cut short or another tool's, the entry is rebuilt.
        try:
            with safe_open(path, "pt") as file:
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                header = file.metadata()
            if header["sha256"] == tensor_digest(entry):
                return entry
        except (OSError, SafetensorError, TypeError, KeyError):
            pass
        say(f"{path} is damaged; rebuilding it")
        return None

    def _write(self, kind: str, key: Key, entry: Entry) -> None:
        path = self._path(kind, key)
        if path is not None:
            header = {"key": canonical(key), "sha256": tensor_digest(entry)}
            write_atomic(path, save({name: tensor.contiguous() for name, tensor in entry.items()}, header))

    def _path(self, kind: str, key: Key) -> Path | None:
        name = digest({"version": VERSION, "kind": kind, **key})
        return None if self.folder is None else self.folder / kind / f"{name}.safetensors"


def chunked(count: int, at_once: int, start: int = 0) -> list[range]:
    """Splits ``count`` positions from ``start`` on into chunks of ``at_once``, the last perhaps shorter."""
    return [range(i, min(i + at_once, start + count)) for i in range(start, start + count, at_once)]


def _is_finite(entry: Entry) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in entry.values())
