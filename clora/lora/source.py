"""Finds and opens the safetensors file of a LoRA; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clora.errors import CloraError, nearest
from clora.files import check_regular, user_path
from clora.hashing import digest, file_digest
from clora.lora.adapter_config import PEFT_WEIGHTS, AdapterConfig, find_config
from clora.lora.families import is_original_only
from clora.lora.keys import FileKeys, sort_keys, split_prefix
from clora.lora.shards import INDEX, all_shards, check_index, refuse_shard

# More than any LoRA has, and few enough to be sorted within a second.
_MAX_TENSORS = 100_000
_MAX_NAME = 500
_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
# In this order, as diffusers and PEFT look for them.
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)


@dataclass(frozen=True)
class LoRASource:
    """The header of a LoRA file, or the headers of all shards of a LoRA.

    Attributes:
        file: the safetensors file, or the index of the shards.
        shapes: tensor name to shape; that of a 1x1 convolution is the matrix's.
        dtypes: tensor name to safetensors dtype (``F32``, ``BF16``, ...).
        metadata: the header's string metadata.
        config: rank and alpha stated beside the tensors.
        keys: the tensor names by module.
        files: tensor name to the safetensors file that holds it.
        ignored: tensor names that the user left out.
    """

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    config: AdapterConfig
    keys: FileKeys
    files: dict[str, Path]
    ignored: tuple[str, ...] = ()
    _opened: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    def read(self, parts: Mapping[str, str]) -> dict[str, Tensor]:
        """Reads tensors on the CPU in fp32, whatever type they are stored in.

        Args:
            parts: the name that each tensor gets, to its key in the file.

        Raises:
            CloraError: one holds NaN or infinite values, or the file became unreadable.
        """
        tensors: dict[str, Tensor] = {}
        for part, key in parts.items():
            file = self.files[key]
            try:
                if file not in self._opened:
                    # Stays open: opening reads the whole header, and a LoRA has thousands of modules.
                    self._opened[file] = safe_open(file, framework="pt")
                tensors[part] = self._opened[file].get_tensor(key).float().reshape(self.shapes[key])
            except (OSError, SafetensorError, RuntimeError) as error:
                raise CloraError(f"{file}: cannot read its tensors: {error}") from error
        for part, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                file = self.files[parts[part]]
                raise CloraError(f"{file}: {parts[part]} holds NaN or infinite values; export the LoRA again")
        return tensors

    @cached_property
    def has_original_names(self) -> bool:
        """True where a module is named as only original repositories name it (``double_blocks.0.img_attn.qkv``)."""
        return any(is_original_only(split_prefix(stem)[1]) for stem in self.keys.modules)

    @property
    def bytes(self) -> int:
        """The size of its weights' files."""
        return sum(file.stat().st_size for file in all_shards(self.file))


def open_lora(path: str | Path, ignore: Sequence[str] = ()) -> LoRASource:
    """Opens a LoRA file or folder and reads its header.

    Args:
        path: a ``.safetensors`` file, the index of shards, or a folder with ``pytorch_lora_weights.safetensors``
            (diffusers), ``adapter_model.safetensors`` (PEFT), their index, or exactly one ``.safetensors``.
        ignore: the beginnings of the tensor names to leave out; ``*`` stands for any text.

    Raises:
        CloraError: missing, ambiguous, empty, truncated or corrupt file, a pickle, one shard of several, an index that
            does not fit its shards, a broken adapter config, or a pattern of `ignore` that fits no name.
    """
    file = find_weights(path)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    metadata: dict[str, str] = {}
    files: dict[str, Path] = {}
    for shard in all_shards(file):
        found, stored, more = _read_header(shard)
        if twice := next(iter(shapes.keys() & found.keys()), None):
            raise CloraError(f"{file}: {twice} is in {files[twice].name} and in {shard.name}; expected it in one shard")
        shapes |= found
        dtypes |= stored
        metadata |= more
        files |= dict.fromkeys(found, shard)
    if file.name.endswith(INDEX):
        check_index(file, files)
    ignored = _ignored(file, shapes, ignore)
    for key in ignored:
        del shapes[key], dtypes[key], files[key]
    if not shapes:
        raise CloraError(
            f"{file} holds no tensors{' but ignored ones' if ignored else ''}; expected the matrices of a LoRA"
        )
    return LoRASource(
        file, shapes, dtypes, metadata, find_config(file, shapes, metadata), sort_keys(shapes), files, ignored
    )


def weights_digest(path: str | Path) -> str:
    """Hashes a LoRA's weights: the sha256 of its file, or of all shards' ones.

    Raises:
        CloraError: as `find_weights`, or a file cannot be read.
    """
    file = find_weights(path)
    shards = all_shards(file)
    return file_digest(file) if shards == [file] else digest({shard.name: file_digest(shard) for shard in shards})


def _read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str], dict[str, str]]:
    """Returns the shapes, types and metadata of a safetensors file."""
    shapes = {}
    dtypes = {}
    try:
        check_regular(file, "a safetensors file")
        if file.stat().st_size == 0:
            raise CloraError(f"{file} is empty (0 bytes); expected a safetensors file. Download or export it again")
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            if len(keys) > _MAX_TENSORS or max(map(len, keys), default=0) > _MAX_NAME:
                raise CloraError(
                    f"{file} holds {len(keys)} tensors with names of up to {max(map(len, keys))} characters; expected a LoRA "
                    f"of at most {_MAX_TENSORS} tensors, with names of at most {_MAX_NAME}"
                )
            # Slices read only the header: a LoRA of many GB costs nothing here.
            for key in keys:
                header = opened.get_slice(key)
                shapes[key] = _matrix_shape(tuple(header.get_shape()))
                dtypes[key] = str(header.get_dtype())
            return shapes, dtypes, dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        message = f"{file} is not a readable safetensors file, it is corrupt or truncated ({error})"
        raise CloraError(f"{message}. Download or export it again") from error


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns ``[out, in]`` for the kernel ``[out, in, 1, 1]`` of a 1x1 convolution, which is the same map."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _ignored(file: Path, keys: Mapping[str, object], patterns: Sequence[str]) -> tuple[str, ...]:
    """Returns the tensor names that patterns leave out; one text is one pattern."""
    ignored: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = [key for key in keys if fnmatchcase(key, f"{pattern}*")]
        if not found:
            raise CloraError(
                f"{file}: ignore: no tensor's name begins with {pattern!r}; name the beginning of a key, * for any text"
                f"{nearest(pattern, keys)}"
            )
        ignored.update(found)
    return tuple(sorted(ignored))


def find_weights(path: str | Path) -> Path:
    """Finds the one weights file that a path stands for, or the index of its shards.

    Raises:
        CloraError: nothing there, several candidates, a pickle, or one shard of several.
    """
    path = user_path(path)
    try:
        if path.is_dir():
            path = _find_in_folder(path)
        exists = path.exists()
    except OSError as error:
        raise CloraError(f"{path} cannot be read: {error}") from error
    if not exists:
        raise CloraError(f"{path} does not exist; expected a .safetensors LoRA file or a folder with one")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle_error(path)
    if path.name.endswith(INDEX):
        return path
    if path.suffix.lower() != ".safetensors":
        raise CloraError(f"{path} is not a .safetensors file; expected a LoRA in safetensors format")
    refuse_shard(path)
    return path


def _find_in_folder(folder: Path) -> Path:
    # A folder may hold other safetensors beside its LoRA, so the usual names decide first.
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.is_file())
    indices = [file for file in files if file.name.endswith(INDEX)]
    if len(indices) == 1:
        return indices[0]
    candidates = [file for file in files if file.suffix.lower() == ".safetensors"]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(file.name for file in candidates)
        raise CloraError(f"{folder} holds {len(candidates)} safetensors files ({names}); name the one you mean")
    for file in files:
        if file.suffix.lower() in _PICKLE_SUFFIXES:
            raise _pickle_error(file)
    found = ", ".join(file.name for file in files[:5]) or "nothing"
    raise CloraError(f"{folder} holds no .safetensors file (found: {found}); expected one LoRA in it")


def _pickle_error(file: Path) -> CloraError:
    return CloraError(
        f"{file} is a pickle ({file.suffix}), which can run any code when it is opened, so it is refused. "
        "Expected .safetensors. If you trust its author, convert it once in an isolated environment: load its state "
        "dict with torch (weights_only=True) and write it with safetensors.torch.save_file"
    )
