"""Using a collection in a stock pipeline: ``pipe(image=source, **effects["snow"])``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clora.collection.metadata import Collection, find_collection, from_metadata, read_collection
from clora.errors import CloraError, nearest
from clora.lora.layers import check_called, uncompiled
from clora.lora.source import LoRASource, open_lora


class Effects:
    """The effects of a collection: ``effects["snow"]`` holds the arguments of a pipeline's call, except the image.

    Iteration yields the names. The prompt is the effect's first; the others, the triggers and everything else are in
    ``effects.collection``.
    """

    def __init__(self, collection: Collection):
        self.collection = collection
        self._prompts = {effect.name: effect.prompts[0] for effect in collection.effects}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Returns the keyword arguments for one effect. Raises CloraError for a name that the collection lacks."""
        if name not in self:
            raise CloraError(f"unknown effect {name!r}; the collection has {', '.join(self)}{nearest(name, self)}")
        return {"prompt": self._prompts[name], **call_arguments(self.collection)}

    def compose(self, first: str, second: str) -> dict[str, Any]:
        """Returns the keyword arguments for two effects in one picture, the first applied before the second.

        Both prompts together must fit into the collection's ``max_sequence_length`` tokens: pipelines cut without a word.

        Raises:
            CloraError: a name that the collection lacks.
        """
        prompts = [self[name]["prompt"].rstrip(" .") for name in (first, second)]
        return self[first] | {"prompt": f"apply {prompts[0]}, then apply {prompts[1]}"}

    def __contains__(self, name: object) -> bool:
        return name in self._prompts

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __repr__(self) -> str:
        return f"Effects({list(self)})"


def call_arguments(collection: Collection) -> dict[str, Any]:
    """Returns the arguments that the collection's pipeline must be called with, as its ``__call__`` names them.

    Raises:
        CloraError: the installed diffusers has no such pipeline.
    """
    sampling = collection.sampling
    arguments = {
        "num_inference_steps": sampling.steps,
        "max_sequence_length": sampling.max_sequence_length,
        "height": sampling.size[0],
        "width": sampling.size[1],
    }
    # Not every pipeline takes all of them: QwenImage21Pipeline has no max_sequence_length.
    known = inspect.signature(pipeline_class(collection).__call__).parameters
    return {name: value for name, value in arguments.items() if name in known} | sampling.call


def pipeline_class(collection: Collection) -> type:
    """Returns the class of the collection's pipeline. Raises CloraError if the installed diffusers has none."""
    import diffusers

    found = getattr(diffusers, collection.pipeline, None)
    if found is None:
        raise CloraError(f"diffusers {diffusers.__version__} has no {collection.pipeline}; a newer one may")
    return found


def load_collection(path: str | Path) -> Effects:
    """Reads the effects of a collection; no pipeline is needed.

    Args:
        path: its folder, its file or its hub id (``owner/name``).

    Raises:
        CloraError: no such collection.
    """
    return Effects(read_collection(path))


def apply(pipeline: Any, path: str | Path) -> Effects:
    """Makes a stock pipeline run a collection: loads its LoRA and sets the scheduler that it was trained for.

    ::

        effects = clora.apply(pipe, "my-collection")
        image = pipe(image=source, **effects["snow"]).images[0]

    Args:
        pipeline: a diffusers pipeline of the collection's base model.
        path: as for `load_collection`.

    Raises:
        CloraError: no such collection, one for another model, or projections of the transformer are fused; the pipeline is
            left as it was.
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


def _load_weights(pipeline: Any, source: LoRASource, base_model: str) -> None:
    """Loads the file as a new adapter, all of it or nothing: diffusers only warns of modules that it skips."""
    transformer = uncompiled(pipeline.transformer)
    if source.keys.format != "diffusers":
        raise CloraError(
            f"{source.file} has the {source.keys.format} format; expected {base_model}'s LoRA in diffusers' format "
            "(clora export --format diffusers)"
        )
    expected = {key.removesuffix(".lora_A.weight") for key in source.shapes if key.endswith(".lora_A.weight")}
    check_called(transformer, sorted(name.removeprefix("transformer.") for name in expected))
    # The pipeline may carry other adapters already; they stay, and only the new one is compared with the file.
    before = set(getattr(transformer, "peft_config", {}))
    try:
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(str(source.file))
        else:  # LongCat-Image-Edit leaves that to its transformer
            transformer.load_lora_adapter(str(source.file), prefix="transformer")
    except (ValueError, RuntimeError, KeyError) as error:
        raise CloraError(f"{source.file} does not fit the pipeline, expected {base_model}: {error}") from error
    new = set(getattr(transformer, "peft_config", {})) - before
    loaded = {
        f"transformer.{name}"
        for name, module in transformer.named_modules()
        if not new.isdisjoint(getattr(module, "lora_A", {}))
    }
    if loaded != expected:
        transformer.delete_adapters(list(new))
        raise CloraError(
            f"{source.file}: the pipeline has taken {len(loaded)} of {len(expected)} modules; expected {base_model}"
        )
