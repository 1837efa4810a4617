"""Using a collection in a stock pipeline: ``pipe(image=source, **effects["snow"])``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from clora.collection.metadata import (
    Collection,
    check_digest,
    find_collection,
    from_metadata,
    read_collection,
)
from clora.errors import CloraError, nearest
from clora.lora.layers import check_called, shapes_beneath, uncompiled
from clora.lora.load import lora_ranks
from clora.lora.source import LoRASource, open_lora, weights_digest
from clora.models import adapter_for

NOT_TO_STATE = {"num_inference_steps", "max_sequence_length", "height", "width", "num_images_per_prompt"}
"""Numbers of a call that are the caller's, or that a collection states elsewhere."""
MOST = {int: 2**32, float: 100.0}
"""The highest values of other numbers: an area in pixels, a guidance scale."""


class Effects:
    """The effects of a collection: ``effects["snow"]`` holds the arguments of a pipeline's call, except the image.

    Iteration yields the names. The prompt is the effect's first; the others, the triggers and everything else are in
    ``effects.collection``.
    """

    def __init__(self, collection: Collection, num_tokens: Callable[[str], int] | None = None):
        """Takes a collection, and how its pipeline counts the tokens of a prompt; None where there is no pipeline."""
        self.collection = collection
        self._num_tokens = num_tokens
        self._prompts = {effect.name: effect.prompts[0] for effect in collection.effects}

    def __getitem__(self, name: str) -> dict[str, Any]:
        """Returns the keyword arguments for one effect. Raises CloraError for a name that the collection lacks."""
        if name not in self:
            raise CloraError(f"unknown effect {name!r}; the collection has {', '.join(self)}{nearest(name, self)}")
        return {"prompt": self._prompts[name], **call_arguments(self.collection)}

    def compose(self, first: str, second: str) -> dict[str, Any]:
        """Returns the keyword arguments for two effects in one picture, the first applied before the second.

        The paper's sentence asks for both in one call, which no training teaches. Look at the results: two calls in a row,
        the second on the first one's picture, are the safer way (docs/method.md, section 6).

        Raises:
            CloraError: a name that the collection lacks, a prompt of more tokens than the pipeline is called with, or effects
                of `load_collection`, which has no tokenizer to count them.
        """
        prompts = [self[name]["prompt"].rstrip(" .") for name in (first, second)]
        prompt = f"Please apply {prompts[0]} to the input image, and then apply {prompts[1]}."
        if self._num_tokens is None:
            raise CloraError(
                "expected the effects that clora.apply(pipe, path) returns: without a pipeline nothing counts the tokens of a "
                "composed prompt"
            )
        found, most = self._num_tokens(prompt), self.collection.sampling.max_sequence_length
        if found > most:
            raise CloraError(
                f"expected a prompt of at most {most} tokens, found {found} for {first!r} and {second!r} together; make two calls "
                f"in a row: pipe(image=pipe(image=source, **effects[{first!r}]).images[0], **effects[{second!r}])"
            )
        return self[first] | {"prompt": prompt}

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
        CloraError: the installed diffusers has no such pipeline, or the collection states an argument that is not its to
            state, or an absurd value.
    """
    sampling = collection.sampling
    arguments = {
        "num_inference_steps": sampling.steps,
        "max_sequence_length": sampling.max_sequence_length,
        "height": sampling.size[0],
        "width": sampling.size[1],
    }
    known = inspect.signature(pipeline_class(collection).__call__).parameters
    for name, value in sampling.call.items():
        default = known[name].default if name in known else None
        if name in NOT_TO_STATE or type(default) not in MOST or not 0 <= value <= MOST[type(default)]:
            raise CloraError(
                f"the collection states {name}={value} for the calls of {collection.pipeline}; expected only numbers such as "
                "guidance_scale=1.0, which switches guidance off. Its metadata is damaged"
            )
    # Not every pipeline takes all of them: QwenImage21Pipeline has no max_sequence_length.
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

    The collection that was applied last is active, and every other LoRA of the transformer is switched off; applying an
    earlier one again switches back to it without loading. ``pipe.unload_lora_weights()`` removes them all.

    Args:
        pipeline: a diffusers pipeline of the collection's base model.
        path: as for `load_collection`.

    Raises:
        CloraError: no such collection, one for another model, damaged metadata or weights, a transformer with fused
            projections, with fused LoRAs or under `clora.attach`, or too little memory. The pipeline is left as it was.
    """
    source = open_lora(find_collection(path))
    collection = from_metadata(source.metadata, str(source.file))
    if collection.pipeline not in {kind.__name__ for kind in type(pipeline).__mro__}:
        raise CloraError(
            f"{source.file} is for {collection.pipeline} ({collection.base_model}), found {type(pipeline).__name__}; "
            "load the collection's base model"
        )
    # All that can be wrong is found before the pipeline is touched.
    call_arguments(collection)
    scheduler = _scheduler(collection, source)
    transformer = uncompiled(pipeline.transformer)
    _check_transformer(transformer)
    _check_weights(transformer, source, collection.base_model)
    with _restored(transformer, source):
        _activate(pipeline, transformer, source)
    pipeline.scheduler = scheduler

    def num_tokens(prompt: str) -> int:
        sampling = collection.sampling
        return adapter_for(pipeline, sampling.size, sampling.max_sequence_length).num_tokens(prompt)

    return Effects(collection, num_tokens)


def _scheduler(collection: Collection, source: LoRASource) -> Any:
    """Makes the collection's scheduler. Raises CloraError for a config of which it cannot be made."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    steps = collection.sampling.steps
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(collection.scheduler)
        trial = FlowMatchEulerDiscreteScheduler.from_config(collection.scheduler)
        trial.set_timesteps(sigmas=[1 - k / steps for k in range(steps)], mu=0.5)
        if trial.sigmas.isfinite().all() and len(trial.sigmas) == steps + 1:
            return scheduler
        reason = f"its noise levels are {trial.sigmas.tolist()[:4]}..."
    except Exception as error:  # a class made from a damaged config raises whatever it meets
        reason = str(error)
    raise CloraError(
        f"{source.file}: the scheduler of its metadata cannot be used ({reason[:1000]}); expected a flow-matching one"
    )


def _check_transformer(transformer: Any) -> None:
    """Refuses a transformer whose layers would pass over the collection's LoRA."""
    for name, layer in transformer.named_modules():
        if hasattr(layer, "routed_layer"):
            raise CloraError(
                f"the transformer is under clora.attach ({name}); call detach() of what clora.attach returned first"
            )
        # PEFT runs only the base's weight while another adapter is merged into it.
        if getattr(layer, "merged", False):
            raise CloraError(
                f"the LoRAs {', '.join(layer.merged_adapters)} are fused into the transformer ({name}), and a collection has "
                "no effect beside fused LoRAs; call pipe.unfuse_lora() first"
            )


def _check_weights(transformer: nn.Module, source: LoRASource, base_model: str) -> None:
    """Refuses a file that diffusers would load in part, or that would make noise; reads one module at a time."""
    if source.keys.format != "diffusers":
        raise CloraError(
            f"{source.file} has the {source.keys.format} format; expected {base_model}'s LoRA in diffusers' format "
            "(clora export --format diffusers)"
        )
    shapes = shapes_beneath(transformer)
    try:
        modules = lora_ranks(source.file, shapes)
    except CloraError as error:
        raise CloraError(f"{error}; expected {base_model}'s LoRA") from error
    check_called(transformer, sorted(modules))
    check_digest(source)


def _activate(pipeline: Any, transformer: Any, source: LoRASource) -> None:
    """Loads the file as an adapter of its own, if it is not there yet, and switches all others off.

    Raises:
        ValueError: not all of it was loaded.
    """
    name = f"clora_{weights_digest(source.file)[:16]}"
    if name not in getattr(transformer, "peft_config", {}):
        if hasattr(pipeline, "load_lora_weights"):
            pipeline.load_lora_weights(str(source.file), adapter_name=name)
        else:  # LongCat-Image-Edit leaves that to its transformer
            transformer.load_lora_adapter(str(source.file), prefix="transformer", adapter_name=name)
    transformer.enable_lora()  # the user may have called disable_lora()
    transformer.set_adapters([name])
    expected = {key.removesuffix(".lora_A.weight") for key in source.shapes if key.endswith(".lora_A.weight")}
    loaded = {
        f"transformer.{module}"
        for module, layer in _peft_layers(transformer).items()
        if name in layer.lora_A and layer.scaling[name] == 1
    }
    if loaded != expected:
        raise ValueError(f"the pipeline has taken {len(loaded)} of {len(expected)} modules")


@contextmanager
def _restored(transformer: Any, source: LoRASource) -> Iterator[None]:
    """Restores the transformer's adapters, which of them are active and their strengths, if the block fails.

    Raises:
        CloraError: whatever the block raised.
    """
    before = set(getattr(transformer, "peft_config", {}))
    states = [
        (layer, list(layer.active_adapters), dict(layer.scaling), layer.disable_adapters)
        for layer in _peft_layers(transformer).values()
    ]
    try:
        yield
    except BaseException as error:  # of diffusers, PEFT and torch, and Ctrl-C
        for name in set(getattr(transformer, "peft_config", {})) - before:
            transformer.delete_adapters([name])
        if not before:
            transformer.unload_lora()
        for layer, active, scaling, disabled in states:
            layer.set_adapter(active)
            layer.scaling.update(scaling)
            layer.enable_adapters(not disabled)
        if not isinstance(error, Exception):
            raise
        reason = "out of memory" if isinstance(error, MemoryError) else str(error)
        raise CloraError(f"{source.file} could not be loaded; the pipeline is as it was: {reason}") from error


def _peft_layers(transformer: Any) -> dict[str, Any]:
    """Returns the layers that PEFT has put LoRAs on."""
    return {name: layer for name, layer in transformer.named_modules() if hasattr(layer, "lora_A")}
