"""Training state on disk: one safetensors file without pickle, and the check that a resumed run is the same run.

The file's tensors are ``tensor/<name>``, ``optimizer/<name>/<parameter>/<state>`` and ``generator/data``; JSON values are
in its header. It is written to a temporary name and renamed, so that a run stopped at any moment leaves a whole one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from clora.config.reading import REMOVED
from clora.config.settings import DistillConfig
from clora.errors import CloraError
from clora.files import write_atomic

# Settings that a resumed run may change: they bound its length and its memory, choose among what it kept, or name where
# files are.
FREE_TO_CHANGE = {
    "train": {
        "updates",
        "minutes",
        "checkpoint_every",
        "export",
        "gradient_rows",
        "forward_rows",
        "teacher_memory_gb",
        "gradient_checkpointing",
    },
    "data": {"cache"},
}


def save_state(
    path: Path,
    tensors: Mapping[str, Tensor],
    optimizers: Mapping[str, torch.optim.Optimizer],
    generator: torch.Generator,
    values: Mapping[str, object],
) -> None:
    """Writes tensors, optimizer states, the generator's state and JSON values to one file, atomically.

    Raises:
        CloraError: the file cannot be written.
    """
    flat = {f"tensor/{name}": tensor.detach().contiguous() for name, tensor in tensors.items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                # bitsandbytes keeps a part of a state in a dictionary of its own; it takes them side by side too.
                parts = value if isinstance(value, Mapping) else {key: value}
                flat |= {f"optimizer/{name}/{i}/{k}": torch.as_tensor(v).clone() for k, v in parts.items()}
    flat["generator/data"] = generator.get_state()
    write_atomic(path, save(flat, metadata={"values": json.dumps(dict(values))}))


def load_state(
    path: Path, optimizers: Mapping[str, torch.optim.Optimizer], generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of `save_state`: returns its tensors and values, and restores optimizers and generator in place.

    Raises:
        CloraError: the file is not a whole checkpoint.
    """
    flat, values = _read(path)
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor | int]] = {}
        for key, value in _under(f"optimizer/{name}/", flat).items():
            index, part = key.split("/")
            is_count = value.ndim == 0 and value.dtype == torch.int64  # a plain number in bitsandbytes
            state.setdefault(int(index), {})[part] = int(value) if is_count else value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(flat["generator/data"])
    return _under("tensor/", flat), values


def load_values(path: Path) -> dict[str, Any]:
    """The JSON values of a file of `save_state`. Raises CloraError as `load_state`."""
    return _read(path, tensors=False)[1]


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            keys = file.keys() if tensors else ()
            return {key: file.get_tensor(key) for key in keys}, json.loads(file.metadata()["values"])
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise CloraError(
            f"checkpoint {path} cannot be read ({error}); remove it to start from the beginning"
        ) from error


def _under(prefix: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}


def resumable_settings(config: DistillConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with the one that it continues."""
    return config.recorded(exclude={"output": True, "device": True, **FREE_TO_CHANGE})


def check_resumable(checkpoint: Path, config: DistillConfig) -> int:
    """The number of updates that a checkpoint holds; reads its settings but no tensors.

    Raises:
        CloraError: it is broken, or another run's.
    """
    values = load_values(checkpoint)
    check_same(values["config"], resumable_settings(config), checkpoint)
    return values["update"]


def check_same(written: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Raises CloraError unless a checkpoint was written with the current values."""
    for key, reason in REMOVED.items():
        section, _, name = key.partition(".")
        if name in written.get(section, {}) and name not in current.get(section, {}):
            raise CloraError(
                f"checkpoint {path} was written by an earlier version with {key}, which was removed, since {reason}; "
                "continue it with that version, or remove it to start from the beginning"
            )
    changed = [key for key in current if written.get(key) != current[key]]
    if changed:
        raise CloraError(
            f"checkpoint {path} was written by another run ({', '.join(changed)} differ); "
            "restore the old settings and files to continue it, or remove it to start from the beginning"
        )
