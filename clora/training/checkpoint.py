"""Training state on disk: one safetensors file, no pickle, written to a temporary name and renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clora.config.settings import DistillConfig
from clora.errors import CloraError
from clora.files import write_atomic


def save_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    generators: Mapping[str, torch.Generator],
    values: Mapping[str, object],
) -> None:
    """Writes tensors, optimizer states, generator states and JSON values to one file, atomically.

    Raises:
        CloraError: the file cannot be written.
    """
    flat = {f"tensor/{name}": t.detach().contiguous() for name, t in tensors.items()}
    for name, optimizer in optimizers.items():
        flat |= {
            f"optimizer/{name}/{i}/{key}": torch.as_tensor(value).clone()
            for i, state in optimizer.state_dict()["state"].items()
            for key, value in _tensors(state)
        }
    flat |= {f"generator/{name}": g.get_state() for name, g in generators.items()}
    write_atomic(path, save(flat, metadata={"values": json.dumps(dict(values))}))


def load_state(
    path: Path, optimizers: Mapping[str, torch.optim.Optimizer], generators: Mapping[str, torch.Generator]
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Reads a file of ``save_state``: returns its tensors and values, and restores optimizers and generators in place.

    Raises:
        CloraError: the file is not a whole checkpoint.
    """
    flat, values = _read(path)
    for name, optimizer in optimizers.items():
        _restore(optimizer, {k.split("/", 2)[2]: v for k, v in flat.items() if k.startswith(f"optimizer/{name}/")})
    for name, generator in generators.items():
        generator.set_state(flat[f"generator/{name}"])
    return {k.split("/", 1)[1]: v for k, v in flat.items() if k.startswith("tensor/")}, values


def load_values(path: Path) -> dict[str, Any]:
    """The JSON values of a file of ``save_state``. Raises CloraError as ``load_state``."""
    return _read(path, tensors=False)[1]


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, object]]:
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys() if tensors else ()
            return {key: file.get_tensor(key) for key in keys}, json.loads(file.metadata()["values"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise CloraError(
            f"checkpoint {path} cannot be read ({error}); remove it to start from the beginning"
        ) from error


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A parameter's state without the dictionary in which bitsandbytes hides a part of it; reading needs none."""
    for key, value in state.items():
        yield from value.items() if isinstance(value, Mapping) else [(key, value)]


def _restore(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split("/")
        is_count = value.ndim == 0 and value.dtype == torch.int64  # a plain number in bitsandbytes
        state.setdefault(int(index), {})[name] = int(value) if is_count else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


FREE_TO_CHANGE = {
    "train": {
        "updates",
        "minutes",
        "checkpoint_every",
        "gradient_rows",
        "forward_rows",
        "teacher_memory_gb",
        "gradient_checkpointing",
    },
    "data": {"cache"},
}


def _resumable(config: DistillConfig) -> dict[str, object]:
    """The settings that a resumed run must share with the one that it continues."""
    return config.recorded(exclude={"output": True, "device": True, **FREE_TO_CHANGE})


def check_resumable(checkpoint: Path, config: DistillConfig) -> int:
    """The updates that a checkpoint holds, its settings alone read. Raises CloraError if it is broken or another run's."""
    values = load_values(checkpoint)
    _check_same(values["config"], _resumable(config), checkpoint)
    return values["update"]


def _check_same(written: Mapping, current: Mapping, path: Path) -> None:
    changed = [key for key in current if written.get(key) != current[key]]
    if changed:
        raise CloraError(
            f"checkpoint {path} was written by another run ({', '.join(changed)} differ); "
            "restore the old settings and files to continue it, or remove it to start from the beginning"
        )
