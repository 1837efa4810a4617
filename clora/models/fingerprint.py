"""Hashes of a pipeline's components, by which the cache notices that another model was loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from clora.errors import CloraError
from clora.files import system_error
from clora.hashing import digest, file_digest, tensor_digest

SAMPLE = 1024
"""The number of values taken from the start, the middle and the end of a large tensor."""

# Settings that change though the component stays the same: its folder, versions, a tokenizer's last call.
_PASSING = {"transformers_version", "name_or_path", "is_local", "local_files_only", "truncation", "padding"}


def component_fingerprints(pipeline) -> dict[str, str]:
    """Returns a hash of each of a pipeline's components by name, and of its own settings as ``pipeline``.

    A model counts with class, configuration, and each tensor's name, dtype, shape and values. Of more than 3 x 1024 values
    three samples are read: a second for 20 billion parameters, where all of them take a minute. Any training or merge
    changes samples of some tensor; a change made by hand to single values in a large one goes unseen. Other components
    (tokenizer, processor, scheduler) count with all that they save. Folder and library versions do not count.
    """
    found = {name: _fingerprint(part) for name, part in pipeline.components.items() if part is not None}
    return found | {"pipeline": digest([type(pipeline).__name__, _lasting(pipeline.config)])}


def _fingerprint(component) -> str:
    if isinstance(component, nn.Module):
        tensors = dict(_samples(component.state_dict()))
        config = getattr(component, "config", {})
        settings = _lasting(config.to_dict() if hasattr(config, "to_dict") else config)
        return digest([type(component).__name__, settings, tensor_digest(tensors)])
    if hasattr(component, "tokenizer") or hasattr(component, "image_processor"):
        # A processor counts with what it consists of (image processor, tokenizer) and with its own plain settings.
        parts = {k: _fingerprint(v) if hasattr(v, "save_pretrained") else v for k, v in vars(component).items()}
        plain = {k: v for k, v in parts.items() if isinstance(v, (str, int, float, list, dict))}
        return digest([type(component).__name__, plain])
    try:
        files = _saved(component)
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        raise CloraError(
            f"{type(component).__name__} cannot be saved in {tempfile.tempdir or 'any folder'} for temporary files: "
            f"{found.strerror or found}; make room there, or set TMPDIR to another folder"
        ) from error
    return digest([type(component).__name__, files])


def _saved(component) -> dict[str, object]:
    """Returns the content of each file that a component saves: JSON values, or a hash."""
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        for file in filter(Path.is_file, Path(folder).rglob("*")):
            saved = _lasting(json.loads(file.read_bytes())) if file.suffix == ".json" else file_digest(file)
            files[str(file.relative_to(folder))] = saved
    return files


def _lasting(config: object) -> object:
    """Returns a configuration without the settings that change though the component stays the same."""
    if not isinstance(config, Mapping):
        return config
    return {k: v for k, v in config.items() if not str(k).startswith("_") and k not in _PASSING}


def _samples(tensors: Mapping[str, object]) -> Iterator[tuple[str, Tensor]]:
    """Yields small tensors whole, samples of large ones, and of quantised ones the plain tensors that they consist of."""
    for name, tensor in tensors.items():
        if hasattr(tensor, "__tensor_flatten__"):
            parts = tensor.__tensor_flatten__()[0]
            yield from _samples({f"{name}.{part}": getattr(tensor, part) for part in parts})
        elif isinstance(tensor, Tensor):
            yield f"{name} {list(tensor.shape)}", _sample(tensor.detach().reshape(-1))


def _sample(values: Tensor) -> Tensor:
    if len(values) <= 3 * SAMPLE:
        return values
    middle = len(values) // 2
    return torch.cat([values[:SAMPLE], values[middle : middle + SAMPLE], values[-SAMPLE:]])
