"""Finds and opens the safetensors file of a LoRA; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clora.errors import CloraError
from clora.files import user_path
from clora.lora.adapter_config import PEFT_WEIGHTS, AdapterConfig, find_config
from clora.lora.keys import FileKeys, sort_keys

_PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
# In this order, as diffusers and PEFT look for them.
_USUAL_NAMES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)


@dataclass(frozen=True)
class LoRASource:
    """The header of a LoRA file.

    Attributes:
        file: the safetensors file.
        shapes: tensor name to shape.
        dtypes: tensor name to safetensors dtype (``F32``, ``BF16``, ...).
        metadata: the header's string metadata.
        config: rank and alpha stated beside the tensors.
        keys: the tensor names by module.
    """

    file: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    config: AdapterConfig
    keys: FileKeys

    def read(self, parts: Mapping[str, str]) -> dict[str, Tensor]:
        """Reads tensors on the CPU in fp32, whatever type they are stored in.

        Args:
            parts: the name that each tensor gets, to its key in the file.

        Raises:
            CloraError: one holds NaN or infinite values, or the file became unreadable.
        """
        try:
            with safe_open(self.file, framework="pt") as opened:
                tensors = {part: opened.get_tensor(key).float() for part, key in parts.items()}
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CloraError(f"{self.file}: cannot read its tensors: {error}") from error
        for part, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise CloraError(f"{self.file}: {parts[part]} holds NaN or infinite values; export the LoRA again")
        return tensors


def open_lora(path: str | Path) -> LoRASource:
    """Opens a LoRA file or folder and reads its header.

    Args:
        path: a ``.safetensors`` file, or a folder with ``pytorch_lora_weights.safetensors`` (diffusers),
            ``adapter_model.safetensors`` (PEFT) or exactly one ``.safetensors``.

    Raises:
        CloraError: missing, ambiguous, empty, truncated or corrupt file, a pickle, or a broken adapter config.
    """
    file = find_weights(path)
    if file.stat().st_size == 0:
        raise CloraError(f"{file} is empty (0 bytes); expected a safetensors file. Download or export it again")
    shapes = {}
    dtypes = {}
    try:
        with safe_open(file, framework="pt") as opened:
            # Slices read only the header: a LoRA of many GB costs nothing here.
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                header = opened.get_slice(key)
                shapes[key] = tuple(header.get_shape())
                dtypes[key] = str(header.get_dtype())
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        message = f"{file} is not a readable safetensors file, it is corrupt or truncated ({error})"
        raise CloraError(f"{message}. Download or export it again") from error
    if not shapes:
        raise CloraError(f"{file} holds no tensors; expected the matrices of a LoRA")
    return LoRASource(file, shapes, dtypes, metadata, find_config(file, shapes, metadata), sort_keys(shapes))


def find_weights(path: str | Path) -> Path:
    """Finds the one weights file that a path stands for.

    Raises:
        CloraError: nothing there, several candidates, or a pickle.
    """
    path = user_path(path)
    try:
        if path.is_dir():
            return _find_in_folder(path)
        exists = path.exists()
    except OSError as error:
        raise CloraError(f"{path} cannot be read: {error}") from error
    if not exists:
        raise CloraError(f"{path} does not exist; expected a .safetensors LoRA file or a folder with one")
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise _pickle_error(path)
    if path.suffix.lower() != ".safetensors":
        raise CloraError(f"{path} is not a .safetensors file; expected a LoRA in safetensors format")
    return path


def _find_in_folder(folder: Path) -> Path:
    # A folder may hold other safetensors beside its LoRA, so the usual names decide first.
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(file for file in folder.iterdir() if file.is_file())
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
