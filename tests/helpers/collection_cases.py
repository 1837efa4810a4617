"""A small description of a collection, for tests."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler

from clora.collection.metadata import CollectedEffect, Collection, Sampling
from clora.collection.write import scheduler_config


def student_scheduler(shift):
    """The scheduler that a collection of this shift has."""
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler_config(shift))


def effect(name="a", prompts=("p",), license=None, **values):
    return CollectedEffect(
        name=name, prompts=prompts, teacher=f"{name}.safetensors", teacher_sha256="ab" * 32, license=license, **values
    )


def describe(*effects, size=(64, 72), steps=8, shift=3.0, max_sequence_length=40, call=None, **values):
    """A collection of these effects, by default one called ``a``, on FLUX.2 [klein]."""
    call = {"guidance_scale": 1.0} if call is None else call
    sampling = Sampling(steps=steps, shift=shift, size=size, max_sequence_length=max_sequence_length, call=call)
    defaults = {"version": "0.0.0", "pipeline": "Flux2KleinPipeline", "base_model": "some/pipeline"}
    return Collection(
        effects=effects or (effect(),), sampling=sampling, scheduler=scheduler_config(shift), **(defaults | values)
    )
