"""Hashes of files, JSON values and tensors: names of cache entries, and fingerprints of a collection's inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clora.errors import CloraError


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's bytes in hexadecimal. Raises CloraError where it cannot be read."""
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            # In pieces, because LoRA files may have many GB.
            while piece := file.read(1 << 20):
                total.update(piece)
    except OSError as error:
        raise CloraError(f"{path} cannot be read: {error}") from error
    return total.hexdigest()


def digest(value: object) -> str:
    """Returns the sha256 of JSON values in hexadecimal; the order of keys does not matter."""
    return hashlib.sha256(canonical(value).encode("utf-8")).hexdigest()


def canonical(value: object) -> str:
    """Returns JSON text with sorted keys."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of tensors' names, types, shapes and values."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(canonical([name, str(tensor.dtype), list(tensor.shape)]).encode("utf-8"))
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()
