"""What an output folder keeps of its run, and the dtype that the run goes on in."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from clora.collection.metadata import LORA_FILE, read_collection
from clora.collection.write import has_settings
from clora.config.settings import DistillConfig
from clora.devices import DTYPES, earlier_auto, multiplies_bfloat16
from clora.errors import CloraError
from clora.files import user_path
from clora.models.loading import run_dtype
from clora.training.checkpoint import stated_values
from clora.training.dtypes import recorded_dtype
from clora.training.resume import Checkpoints, check_resumable

CACHE = ".clora-cache"
"""In the output folder; huggingface_hub has a .cache of its own in a folder that it downloaded."""
CHECKPOINT = f"{CACHE}/checkpoints"
FINISHED = f"{CACHE}/finished.safetensors"
EARLIER_CHECKPOINT = ".checkpoint.safetensors"


def with_run_dtype(config: DistillConfig, device: torch.device) -> tuple[DistillConfig, str]:
    """Returns the config with the dtype that ``auto`` is for its run, and a line for the user.

    That of the run of these settings which the output folder holds, stopped or finished, else that of the device. The line
    is empty where both are the same and nothing is slow.
    """
    usual = run_dtype(config)
    kept = _kept_dtype(config, user_path(config.output), device) if config.dtype == "auto" else None
    found = kept or usual
    is_slow = found == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16()
    line = f"dtype: auto is {found} here, as of the run that {config.output} holds" if found != usual else ""
    if is_slow:
        anew = "float32 and another output to begin anew" if kept else "float32"
        slow = f"mostly several times slower than float32 on a CPU that does not multiply in it, as PyTorch finds of this one; set {anew}"
        line = f"{line}: {slow}" if line else f"dtype: bfloat16 is {slow}"
    return config.model_copy(update={"dtype": found}), line


def _kept_dtype(config: DistillConfig, output: Path, device: torch.device) -> str | None:
    """The dtype of the run that a folder holds; None where none would go on or count as finished.

    Settings are compared, and no inputs: the base's fingerprints depend on the dtype.
    """
    for file in [*Checkpoints(output / CHECKPOINT, earlier=output / EARLIER_CHECKPOINT).files(), output / FINISHED]:
        with suppress(CloraError):  # damaged, or of another run
            values = stated_values(file)
            found = recorded_dtype(file, values, device)
            inputs = values.get("inputs")
            same = _completed(config, values.get("config"), found)
            check_resumable(file, values, same, inputs if isinstance(inputs, Mapping) else {})
            return found
    # Not the folder, whose name might be that of a repository on the Hub.
    if (output / LORA_FILE).exists():
        with suppress(CloraError):
            collection = read_collection(output / LORA_FILE)
            found = collection.provenance.get("dtype", earlier_auto(device))
            if found in DTYPES and has_settings(collection, _completed(config, collection.provenance, found)):
                return found
    return None


def _completed(config: DistillConfig, recorded: Any, dtype: str) -> DistillConfig:
    """The config in a dtype, with the guidance of a run's record where only the base, which is not loaded, decides it."""
    sampler = recorded.get("sampler") if isinstance(recorded, Mapping) else None
    if not isinstance(sampler, Mapping):
        return config
    guidance = {key: sampler.get(key) for key in ("guidance", "teacher_norm_rescale", "guidance_embedding")}
    # Recorded where it is not that of scoring (`DistillConfig.recorded`).
    guidance["teacher_guidance"] = sampler.get("teacher_guidance", guidance["guidance"])
    free = {key: value for key, value in guidance.items() if getattr(config.sampler, key) in (None, "stock")}
    return config.model_copy(update={"dtype": dtype, "sampler": config.sampler.model_copy(update=free)})
