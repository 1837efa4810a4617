"""The dtype that a run computes in: its checkpoints record what was taken, since ``auto`` depends on the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clora.config.settings import DistillConfig
from clora.devices import DTYPES, earlier_auto, find_device
from clora.models.loading import run_dtype
from clora.training.checkpoint import DamagedCheckpoint, UnusableCheckpoint


def recorded_dtype(path: Path, values: Mapping[str, Any], device: torch.device) -> str:
    """Returns the name of the dtype that a checkpoint's run computes in.

    Args:
        path: of the checkpoint, for the message.
        values: its values.
        device: of this run; by it earlier versions, which recorded only the setting, took one for ``auto``.

    Raises:
        DamagedCheckpoint: it has a dtype that no run has.
    """
    setting = values["config"].get("dtype", "auto") if isinstance(values.get("config"), Mapping) else "auto"
    found = values.get("dtype", earlier_auto(device) if setting == "auto" else setting)
    if found not in DTYPES:
        raise DamagedCheckpoint(path, f"its dtype is {found!r}")
    return found


def check_dtype(path: Path, values: Mapping[str, Any], config: DistillConfig) -> None:
    """Raises CloraError if a run was begun in another dtype than that of the config (`run_dtype`)."""
    written, found = recorded_dtype(path, values, find_device(config.device)), run_dtype(config)
    if found != written:
        raise UnusableCheckpoint(
            f"checkpoint {path} is of a run in another dtype: expected dtype {written}, found {found}",
            f"set dtype to {written} or auto to continue it, or remove it to start from the beginning",
        )
