"""Tensors kept on disk under the hash of everything that they were made from; read again only if they are whole.

One safetensors file per entry. Its header holds the entry's key, as JSON, and the hash of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clora.files import write_atomic
from clora.hashing import canonical, digest, tensor_digest
from clora.progress import say

VERSION = 1
"""Raised whenever clora computes an entry otherwise than before."""

Entry = Mapping[str, Tensor]
Key = Mapping[str, object]
"""Everything that an entry is made from: JSON values, and hashes of large inputs."""


class Cache:
    """A folder of entries.

    Args:
        folder: created with the first entry; several runs may share it. None keeps nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder

    def entries(
        self, kind: str, keys: Sequence[Key], make: Callable[[list[int]], Iterable[tuple[int, Entry]]]
    ) -> list[Entry]:
        """The entry of each key, read where the folder has it and made where it has not.

        Args:
            kind: the name of a subfolder.
            keys: one for each entry.
            make: called with the positions of missing entries, unless all are found; yields each position with its
                entry, which is written at once: work that is interrupted keeps what it had.

        Raises:
            CloraError: an entry cannot be written.
        """
        # Reading comes first and whole, so that ``make`` can batch whatever is missing.
        found = {i: entry for i, key in enumerate(keys) if (entry := self._read(kind, key)) is not None}
        missing = [i for i in range(len(keys)) if i not in found]
        for i, entry in make(missing) if missing else ():
            self._write(kind, keys[i], entry)
            found[i] = entry
        return [found[i] for i in range(len(keys))]

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
