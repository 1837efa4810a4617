"""The table of adapters by pipeline class."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from clora.errors import CloraError
from clora.models.common import no_guidance_embedding
from clora.models.protocol import ModelAdapter

# Adapters by pipeline class, named, not imported: a family's module may need classes that an older diffusers lacks.
_ADAPTERS: dict[str, str | Callable[..., ModelAdapter]] = {
    "Flux2KleinPipeline": "clora.models.families.flux2:Flux2KleinAdapter",
    "Flux2Pipeline": "clora.models.families.flux2:Flux2Adapter",
    "FluxKontextPipeline": "clora.models.families.flux_kontext:FluxKontextAdapter",
    "LongCatImageEditPipeline": "clora.models.families.longcat_image:LongCatImageEditAdapter",
    "QwenImage21Pipeline": "clora.models.families.qwen_image21:QwenImage21Adapter",
    "QwenImageEditPipeline": "clora.models.families.qwen_image:QwenImageEditAdapter",
    "QwenImageEditPlusPipeline": "clora.models.families.qwen_image:QwenImageEditPlusAdapter",
    "ZImageOmniPipeline": "clora.models.families.z_image:ZImageOmniAdapter",
}


def register(pipeline_class: str, adapter: Callable[..., ModelAdapter]) -> None:
    """Adds an adapter for a pipeline class, or replaces one.

    Args:
        pipeline_class: name of the class.
        adapter: called as ``adapter(pipeline, size, max_sequence_length)``; with ``guidance_embedding=`` too where one is
            wanted and it has this parameter.
    """
    _ADAPTERS[pipeline_class] = adapter


def adapter_for(
    pipeline, size: tuple[int, int], max_sequence_length: int, guidance_embedding: float | None = None
) -> ModelAdapter:
    """Returns the adapter of a loaded pipeline, chosen by its class.

    Args:
        pipeline: a diffusers pipeline.
        size: height and width of the images in pixels.
        max_sequence_length: most text tokens of a prompt.
        guidance_embedding: guidance scale embedded in every pass; None for that of a stock call.

    Raises:
        CloraError: the family has no adapter, or no guidance embedding though one is wanted.
    """
    name = type(pipeline).__name__
    if name not in _ADAPTERS:
        raise CloraError(f"expected a pipeline of one of {sorted(_ADAPTERS)}, found {name}; it is not supported yet")
    found = _ADAPTERS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    if guidance_embedding is None:
        return found(pipeline, size, max_sequence_length)
    if "guidance_embedding" not in inspect.signature(found).parameters:
        raise no_guidance_embedding(pipeline, guidance_embedding)
    return found(pipeline, size, max_sequence_length, guidance_embedding=guidance_embedding)
