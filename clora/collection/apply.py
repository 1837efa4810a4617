"""Using a collection in a stock pipeline: ``pipe(image=source, **effects["snow"])``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clora.collection.metadata import CollectedEffect, Collection, find_collection, from_metadata, read_collection
from clora.errors import CloraError, nearest
from clora.lora.source import LoRASource, open_lora


class Effects:
    """The effects of a collection: ``effects["snow"]`` is what to call the pipeline with, all but the image.

    Iterating gives the names. The prompt is the first of the effect's; the others, the triggers and everything else
    are in ``effects.collection``.
    """

    def __init__(self, collection: Collection):
        self.collection = collection

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The keyword arguments for one effect. Raises CloraError for a name that the collection lacks."""
        return {"prompt": self._find(name).prompts[0], **call_arguments(self.collection)}

    def compose(self, first: str, second: str) -> dict[str, Any]:
        """The keyword arguments for two effects in one picture, the first applied before the second.

        Both prompts together must fit into the collection's ``max_sequence_length`` tokens: a pipeline cuts silently.

        Raises:
            CloraError: a name that the collection lacks.
        """
        prompts = [self._find(name).prompts[0].rstrip(" .") for name in (first, second)]
        return {"prompt": f"apply {prompts[0]}, then apply {prompts[1]}", **call_arguments(self.collection)}

    def _find(self, name: str) -> CollectedEffect:
        for effect in self.collection.effects:
            if effect.name == name:
                return effect
        raise CloraError(f"unknown effect {name!r}; the collection has {', '.join(self)}{nearest(name, self)}")

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __iter__(self) -> Iterator[str]:
        return (effect.name for effect in self.collection.effects)

    def __len__(self) -> int:
        return len(self.collection.effects)

    def __repr__(self) -> str:
        return f"Effects({list(self)})"


def call_arguments(collection: Collection) -> dict[str, Any]:
    """How the collection's pipeline must be called, under the names that its own ``__call__`` has.

    Raises:
        CloraError: the installed diffusers has no such pipeline.
    """
    known = inspect.signature(pipeline_class(collection).__call__).parameters
    sampling = collection.sampling
    height, width = sampling.size
    arguments = {
        "num_inference_steps": sampling.steps,
        "max_sequence_length": sampling.max_sequence_length,
        "height": height,
        "width": width,
    }
    return {name: value for name, value in arguments.items() if name in known} | sampling.call


def pipeline_class(collection: Collection) -> type:
    """The class of the collection's pipeline. Raises CloraError where the installed diffusers has none."""
    import diffusers

    found = getattr(diffusers, collection.pipeline, None)
    if found is None:
        raise CloraError(f"diffusers {diffusers.__version__} has no {collection.pipeline}; a newer one may")
    return found


def load_collection(path: str | Path) -> Effects:
    """The effects of a collection.

    Args:
        path: its folder, its file or its hub id (``owner/name``).

    Raises:
        CloraError: no such collection.
    """
    return Effects(read_collection(path))


def apply(pipeline, path: str | Path) -> Effects:
    """Makes a stock pipeline run a collection: loads its LoRA and sets the scheduler it was trained for.

    ::

        effects = clora.apply(pipe, "my-collection")
        image = pipe(image=source, **effects["snow"]).images[0]

    Args:
        pipeline: a diffusers pipeline of the collection's base model.
        path: as for `load_collection`.

    Raises:
        CloraError: no such collection, or one for another model; the pipeline is as it was then.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    source = open_lora(find_collection(path))
    collection = from_metadata(source.metadata, str(source.file))
    if collection.pipeline not in {kind.__name__ for kind in type(pipeline).__mro__}:
        raise CloraError(
            f"{source.file} is for {collection.pipeline} ({collection.base_model}), found {type(pipeline).__name__}; "
            "load the collection's base model"
        )
    _load_weights(pipeline, source, collection.base_model)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(collection.scheduler)
    return Effects(collection)


def _load_weights(pipeline, source: LoRASource, base_model: str) -> None:
    """Loads the file as a new adapter, all of it or nothing: diffusers only warns of what it passes over."""
    before = _adapters(pipeline)
    try:
        _load_lora_file(pipeline, str(source.file))
    except (ValueError, RuntimeError, KeyError) as error:
        raise CloraError(f"{source.file} does not fit the pipeline, expected {base_model}: {error}") from error
    new = _adapters(pipeline) - before
    loaded = {
        name
        for name, module in pipeline.transformer.named_modules()
        if not new.isdisjoint(getattr(module, "lora_A", {}))
    }
    expected = {key.removesuffix(".lora_A.weight") for key in source.shapes if key.endswith(".lora_A.weight")}
    if {f"transformer.{name}" for name in loaded} != expected:
        pipeline.transformer.delete_adapters(list(new))
        raise CloraError(
            f"{source.file}: the pipeline has taken {len(loaded)} of {len(expected)} modules; expected {base_model} and "
            "a file in diffusers' format (clora export --format diffusers)"
        )


def _load_lora_file(pipeline, file: str) -> None:
    """Loads a LoRA the way that the pipeline has for it; raises what diffusers raises."""
    if loads_lora_weights(type(pipeline)):
        pipeline.load_lora_weights(file)
    else:
        pipeline.transformer.load_lora_adapter(file, prefix="transformer")


def loads_lora_weights(pipeline_class: type) -> bool:
    """Whether a pipeline loads LoRAs itself; LongCat-Image-Edit leaves that to its transformer."""
    return hasattr(pipeline_class, "load_lora_weights")


def _adapters(pipeline) -> set[str]:
    return set(getattr(pipeline.transformer, "peft_config", {}))
