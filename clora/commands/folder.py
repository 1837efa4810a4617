"""What an output folder keeps of its run, and the dtype that the run goes on in."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from clora.collection.metadata import LORA_FILE, read_collection
from clora.config.settings import DistillConfig
from clora.devices import DTYPES, dtype_name, earlier_auto, find_dtype
from clora.errors import CloraError
from clora.files import user_path
from clora.training.checkpoint import stated_values
from clora.training.dtypes import recorded_dtype
from clora.training.resume import Checkpoints

CACHE = ".clora-cache"
"""In the output folder; huggingface_hub has a .cache of its own in a folder that it downloaded."""
CHECKPOINT = f"{CACHE}/checkpoints"
FINISHED = f"{CACHE}/finished.safetensors"
EARLIER_CHECKPOINT = ".checkpoint.safetensors"


def with_run_dtype(config: DistillConfig, device: torch.device) -> tuple[DistillConfig, str]:
    """Returns the config with the dtype that ``auto`` is for its run, and a line for the user.

    That of the run which the output folder holds, stopped or finished, else that of the device. The line is empty where
    both are the same.
    """
    if config.dtype != "auto":
        return config, ""
    usual = dtype_name(find_dtype("auto", device))
    found = _kept_dtype(user_path(config.output), device) or usual
    line = "" if found == usual else f"dtype: auto is {found} here, as of the run that {config.output} holds"
    return config.model_copy(update={"dtype": found}), line


def _kept_dtype(output: Path, device: torch.device) -> str | None:
    """The dtype of the run that a folder holds; None where there is none, or nothing of it can be read."""
    with suppress(CloraError):
        for file in [*Checkpoints(output / CHECKPOINT, earlier=output / EARLIER_CHECKPOINT).files(), output / FINISHED]:
            if values := stated_values(file):
                return recorded_dtype(file, values, device)
        # Not the folder, whose name might be that of a repository on the Hub.
        if (output / LORA_FILE).exists():
            found = read_collection(output / LORA_FILE).provenance.get("dtype", earlier_auto(device))
            return found if found in DTYPES else None
    return None
