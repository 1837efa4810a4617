"""A pipeline without its weights: every model built from its config, tokenizers and schedulers whole."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clora.config.settings import DistillConfig, EffectConfig
from clora.devices import find_device, move
from clora.errors import CloraError
from clora.lora.load import read_lora
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.progress import quiet_libraries, say

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*", "*.gguf")


def pipeline_folder(path: str) -> Path:
    """The folder of a pipeline; of one on the Hub, everything but its weights is downloaded.

    Raises:
        CloraError: neither a folder nor a repository that can be reached.
    """
    folder = Path(path)
    if folder.exists():
        return folder
    if folder.is_absolute() or path.startswith("."):
        raise CloraError(f"pipeline {path!r}: no such folder; expected a pipeline's folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=list(WEIGHTS)))
    except Exception as error:  # the hub's client raises many kinds: no network, no such repository, no access
        raise CloraError(
            f"pipeline {path!r}: there is no such folder, and it cannot be had from the Hub ({error})"
        ) from error


def skeleton(path: str, dtype: torch.dtype) -> Any:
    """The pipeline of a folder or hub id without its weights.

    diffusers' models are on fake tensors, which cost nothing and can be computed with under their own ``fake_mode``; text
    encoders are on the meta device, since transformers fills them by values that fake tensors lack.

    Args:
        path: folder or hub id; only configs and tokenizers are read.
        dtype: of the models.

    Raises:
        CloraError: no diffusers pipeline, or a component whose config cannot be used.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    folder = pipeline_folder(path)
    index, pipeline_class = _read_index(path, folder)
    mode, parts = FakeTensorMode(allow_non_fake_inputs=True), {}
    with quiet_libraries():
        for name, value in index.items():
            if not name.startswith("_"):
                parts[name] = _component(folder / name, *value, dtype, mode) if isinstance(value, list) else value
        return pipeline_class(**parts)


def check_processors(path: str) -> None:
    """Loads what prepares pictures for a pipeline's models, and drops it: what it lacks is told before weights are loaded.

    Args:
        path: folder or hub id; no weights are downloaded.

    Raises:
        CloraError: no diffusers pipeline, or a processor that cannot be loaded.
    """
    folder = pipeline_folder(path)
    with quiet_libraries():
        for name, value in _read_index(path, folder)[0].items():
            if isinstance(value, list) and "Processor" in (value[1] or ""):
                _component(folder / name, *value, torch.float32, None)


def _read_index(path: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """A pipeline's model_index.json, and the class that it names."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        return index, getattr(importlib.import_module("diffusers"), index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CloraError(
            f"pipeline {path!r} is no diffusers pipeline that is known here ({folder / 'model_index.json'}: {error!r}); "
            "expected a folder as save_pretrained writes it, or a newer diffusers"
        ) from error


def _component(folder: Path, library: str | None, name: str | None, dtype: torch.dtype, mode: Any) -> Any:
    """A model from its config alone; a tokenizer, processor or scheduler; None for what the pipeline does without."""
    if library is None or name is None:
        return None
    try:
        found = getattr(importlib.import_module(library), name)
        if not issubclass(found, torch.nn.Module):
            return found.from_pretrained(folder)
        with _default_dtype(dtype), mode if library == "diffusers" else torch.device("meta"):
            return _build(found, folder, library).eval().requires_grad_(False)
    except Exception as error:  # readers of damaged configs raise whatever they meet
        raise CloraError(f"{folder} cannot be loaded as {name}: {_reason(error)}") from error


def _build(found: Any, folder: Path, library: str) -> torch.nn.Module:
    if library == "diffusers":
        return found.from_config(found.load_config(folder))
    return found(found.config_class.from_pretrained(folder))


def _reason(error: Exception) -> str:
    """transformers reads pictures and videos by torchvision, and says so at length."""
    if "torchvision" in str(error).lower():
        return f"it needs torchvision; pip install torchvision, the release for torch {torch.__version__}"
    return str(error)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_teacher(
    effect: EffectConfig, shapes: Mapping[str, tuple[int, int]], weights: Mapping[str, torch.Tensor]
) -> LoRAState:
    """An effect's LoRA; says so where it is not exact. Raises CloraError as `clora.lora.load.read_lora`."""
    state = read_lora(effect.lora, shapes, weights, max_error=effect.max_error)
    if state.errors:
        worst = max(state.errors.values())
        say(
            f"effect {effect.name}: {len(state.errors)} layers without low rank became factors, error {worst:.2%} at most"
        )
    return state


def with_guidance(config: DistillConfig, adapter: ModelAdapter) -> DistillConfig:
    """The config with the guidance that its family has by default, where it says nothing."""
    w = config.sampler.guidance
    guidance = {
        "guidance": adapter.default_guidance if w is None else w,
        "guidance_embedding": adapter.guidance_embedding,
    }
    return config.model_copy(update={"sampler": config.sampler.model_copy(update=guidance)})


def load_pipeline(path: str, device: str, dtype: torch.dtype = torch.float32):
    """A pipeline by folder or hub id, frozen.

    Args:
        path: folder or hub id.
        device: where all of it goes (see `find_device`).
        dtype: of all its weights, whatever they were saved in, but those that their own configuration quantises.

    Raises:
        CloraError: it cannot be loaded, or the device is not there.
    """
    from diffusers import DiffusionPipeline

    target = find_device(device)
    folder = Path(path)
    _refuse_pickles(folder)
    check_processors(path)
    try:
        with quiet_libraries():
            pipeline = DiffusionPipeline.from_pretrained(folder if folder.exists() else path, **_dtype_argument(dtype))
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
                move(component, target)
        return pipeline
    except Exception as error:  # readers of damaged configs, tokenizers and weights raise whatever they meet
        raise CloraError(f"pipeline {path!r} cannot be loaded: {error}") from error


def _dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """``from_pretrained``'s own, under the name that it has in this version."""
    import diffusers

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


def _refuse_pickles(folder: Path) -> None:
    """Where a component has no safetensors, diffusers would open its pickle, which can run any code."""
    for file in sorted(folder.glob("*/*.bin")):
        if not any(file.parent.glob("*.safetensors")):
            raise CloraError(
                f"{file} is a pickle, which can run any code when it is opened, so it is refused; expected "
                "safetensors. If you trust its author, load the pipeline once in an isolated environment and write it "
                "with save_pretrained(folder, safe_serialization=True)"
            )
