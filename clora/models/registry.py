"""Which adapter serves which pipeline class."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from clora.errors import CloraError
from clora.models.protocol import ModelAdapter

# Adapters by pipeline class, named, not imported: a family's module may need classes that an older diffusers lacks.
_ADAPTERS: dict[str, str | Callable[..., ModelAdapter]] = {"Flux2KleinPipeline": "clora.models.flux2:Flux2KleinAdapter"}


def register(pipeline_class: str, adapter: Callable[..., ModelAdapter]) -> None:
    """Adds an adapter for a pipeline class, or replaces one.

    Args:
        pipeline_class: name of the class.
        adapter: called as ``adapter(pipeline, size, max_sequence_length)``.
    """
    _ADAPTERS[pipeline_class] = adapter


def adapter_for(pipeline, size: tuple[int, int], max_sequence_length: int) -> ModelAdapter:
    """The adapter of a loaded pipeline, chosen by its class. Raises CloraError for a family without one."""
    name = type(pipeline).__name__
    if name not in _ADAPTERS:
        raise CloraError(f"expected a pipeline of one of {sorted(_ADAPTERS)}, found {name}; it is not supported yet")
    found = _ADAPTERS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    return found(pipeline, size, max_sequence_length)
