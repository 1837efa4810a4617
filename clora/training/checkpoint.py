"""Training state on disk: one safetensors file without pickle, whole or refused.

The file's tensors are ``tensor/<name>``, ``optimizer/<name>/<parameter>/<state>`` and ``generator/data``. Its header has JSON
values and the hash of both. Which of a run's files is continued is `clora.training.resume`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clora.errors import CloraError
from clora.files import replacing
from clora.hashing import digest, tensor_digest


class UnusableCheckpoint(CloraError):
    """A checkpoint that a run cannot go on from.

    Args:
        reason: why.
        advice: what to do where the run needs it; without, where it goes on from another one or begins anew.
    """

    def __init__(self, reason: str, advice: str):
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


class DamagedCheckpoint(UnusableCheckpoint):
    """A file that is not the checkpoint that was written."""

    def __init__(self, path: Path, found: object):
        super().__init__(f"checkpoint {path} is damaged ({found})", "remove it to start from the one before or anew")


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
    text = json.dumps(dict(values))
    with replacing(path) as file:
        save_file(flat, file, {"values": text, "sha256": _checksum(flat, text)})


def load_state(
    path: Path, optimizers: Mapping[str, torch.optim.Optimizer], generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of `save_state`: returns its tensors and values, and restores optimizers and generator in place.

    Raises:
        DamagedCheckpoint: the file is not what was written, or lacks a part.
    """
    flat, values = _read(path)
    try:
        for name, optimizer in optimizers.items():
            _restore(optimizer, _under(f"optimizer/{name}/", flat), name)
        generator.set_state(flat["generator/data"])
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(path, f"{type(error).__name__}: {error}") from error
    return _under("tensor/", flat), values


def load_values(path: Path) -> dict[str, Any]:
    """Returns the JSON values of a file of `save_state`, which is read whole and compared with its hash.

    Raises:
        DamagedCheckpoint: as `load_state`.
    """
    return _read(path)[1]


def stated_values(path: Path) -> dict[str, Any]:
    """Returns the JSON values in the header of a file of `save_state`, which is not verified; none of a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})["values"])
    except (OSError, SafetensorError, LookupError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _restore(optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor], name: str) -> None:
    """Restores an optimizer, which has a state of every parameter or has made no step."""
    state: dict[int, dict[str, Tensor | int]] = {}
    for key, value in flat.items():
        index, part = key.split("/")
        is_count = value.ndim == 0 and value.dtype == torch.int64  # a plain number in bitsandbytes
        state.setdefault(int(index), {})[part] = int(value) if is_count else value
    written = optimizer.state_dict()
    count = sum(len(group["params"]) for group in written["param_groups"])
    if state and set(state) != set(range(count)):
        raise ValueError(f"the optimizer of {name} has states of {len(state)} parameters, expected {count}")
    if len({frozenset(parts) for parts in state.values()}) > 1:
        raise ValueError(f"the optimizer of {name} lacks parts of its state")
    optimizer.load_state_dict({"state": state, "param_groups": written["param_groups"]})


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, "pt") as file:
            flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
        values = json.loads(header["values"])
        if not isinstance(values, dict):
            raise ValueError("it has no values")
        # Earlier versions wrote no hash, and did not record what the run is trained on either.
        is_earlier = "sha256" not in header and "inputs" not in values
        if not is_earlier and header.get("sha256") != _checksum(flat, header["values"]):
            raise ValueError("its content is not what was written")
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(path, error) from error
    return flat, values


def _checksum(flat: Mapping[str, Tensor], values: str) -> str:
    return digest([values, tensor_digest(flat)])


def _under(prefix: str, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in flat.items() if key.startswith(prefix)}
