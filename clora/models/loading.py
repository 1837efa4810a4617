"""Loads the inputs of a run: the pipeline with its weights, its family's guidance, and the teachers' LoRAs.

`clora.models.skeleton` loads a pipeline without weights.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clora.config.settings import DistillConfig, EffectConfig
from clora.devices import dtype_name, find_device, find_dtype, move
from clora.errors import CloraError
from clora.lora.load import NOTHING, load_lora
from clora.lora.state import LoRAState
from clora.models import ModelAdapter, adapter_for
from clora.models.skeleton import check_processors
from clora.progress import quiet_libraries, say


def load_pipeline(path: str, device: str, dtype: torch.dtype = torch.float32):
    """Loads a pipeline, frozen.

    Args:
        path: folder or hub id.
        device: where all of it goes (see `find_device`).
        dtype: of all weights, in whatever dtype they were saved, except those that their own configuration quantises.

    Raises:
        CloraError: it cannot be loaded, or the device does not exist.
    """
    import diffusers

    target = find_device(device)
    folder = Path(path)
    _refuse_pickles(folder)
    check_processors(path)
    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    # diffusers 0.42 gave this argument its shorter name.
    dtype_argument = {"dtype" if version >= (0, 42) else "torch_dtype": dtype}
    source = folder if folder.exists() else path
    try:
        with quiet_libraries():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(source, use_safetensors=True, **dtype_argument)
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                move(component, target)
        return pipeline
    except Exception as error:  # readers of damaged files raise errors of many kinds
        raise CloraError(f"pipeline {path!r} cannot be loaded: {error}") from error


def _refuse_pickles(folder: Path) -> None:
    """Raises CloraError for a component without safetensors: diffusers would open its pickle, which can run any code."""
    for file in sorted(folder.glob("*/*.bin")):
        if not any(file.parent.glob("*.safetensors")):
            raise CloraError(
                f"{file} is a pickle, which can run any code when it is opened, so it is refused; expected "
                "safetensors. If you trust its author, load the pipeline once in an isolated environment and write it "
                "with save_pretrained(folder, safe_serialization=True)"
            )


def load_teacher(effect: EffectConfig, transformer: torch.nn.Module) -> LoRAState:
    """Loads an effect's LoRA, and reports factors that are not exact.

    Raises:
        CloraError: as `clora.load_lora`, or the LoRA changes nothing.
    """
    state = load_lora(effect.lora, transformer, max_error=effect.max_error, ignore=effect.ignore)
    if not any(module.lora_A.any() and module.lora_B.any() for module in state.modules.values()):
        raise CloraError(f"effect {effect.name}: {effect.lora}: {NOTHING}")
    if state.errors:
        worst = max(state.errors.values())
        say(
            f"effect {effect.name}: {len(state.errors)} layers without low rank became factors, error {worst:.2%} at most"
        )
    return state


def run_dtype(config: DistillConfig) -> str:
    """Returns the name of the dtype that a config's pipeline is loaded in, which checkpoints and collection record.

    It is not that of the latents, which some families keep in another one, nor of every weight.
    """
    return dtype_name(find_dtype(config.dtype, find_device(config.device)))


def load_adapter(config: DistillConfig) -> tuple[DistillConfig, ModelAdapter]:
    """Loads a config's pipeline onto the CPU, in the dtype of `run_dtype`; see `adapt` for the result."""
    return adapt(config, load_pipeline(config.pipeline, "cpu", getattr(torch, run_dtype(config))))


def adapt(config: DistillConfig, pipeline) -> tuple[DistillConfig, ModelAdapter]:
    """Returns a config with the guidance of the pipeline's family where it states none, and the adapter that it sets up."""
    data = config.data
    adapter = adapter_for(pipeline, data.size, data.max_sequence_length, config.sampler.guidance_embedding)
    return with_guidance(config, adapter), adapter


def with_guidance(config: DistillConfig, adapter: ModelAdapter) -> DistillConfig:
    """Returns the config with the guidance of its family where it states none."""
    sampler = config.sampler
    is_stock = sampler.teacher_guidance == "stock"
    rescale = sampler.teacher_norm_rescale
    if rescale is None:
        rescale = adapter.stock_norm_rescale if is_stock else config.objective.norm_rescale
    guidance = {
        "guidance": adapter.default_guidance if sampler.guidance is None else sampler.guidance,
        "teacher_guidance": adapter.stock_guidance if is_stock else sampler.teacher_guidance,
        "teacher_norm_rescale": rescale,
        "guidance_embedding": adapter.guidance_embedding,
    }
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=guidance)})
