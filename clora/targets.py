"""Rendered targets behind the cache: each costs many passes, and other runs want most of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.cache import Cache, Entry, Key, digest, tensor_digest
from clora.conditioning import Text
from clora.config import DistillConfig
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.progress import Advance, stage
from clora.prompt_table import PromptTable
from clora.rendering import (
    Samples,
    general_seeds,
    num_passes,
    render_some_general_targets,
    render_some_targets,
    target_seeds,
)

Render = Callable[[Sequence[int], Advance], Iterator[tuple[int, Tensor]]]
NO_TARGET_READS = {"steps", "shift", "integer_timesteps"}  # of the sampler's settings: those of the student


@dataclass(frozen=True)
class CachedTargets:
    """Renders what the cache does not have; an entry is one picture.

    Attributes:
        config: sampler settings and seed.
        adapter: the model family.
        table, text: the prompts, and the same encoded.
        cache: what was rendered before.
        components: what the pipeline is (`clora.fingerprint.component_fingerprints`).
    """

    config: DistillConfig
    adapter: ModelAdapter
    table: PromptTable
    text: Text
    cache: Cache
    components: Mapping[str, str]

    def of_teachers(self, teachers: Mapping[str, LoRAState], samples: Samples, images: Sequence[str]) -> Tensor:
        """What E teachers make of ``samples [E, M]``, ``[E, M, T, C]``; ``images`` has the hash of each source in order."""
        (num_effects, num_sources), made_from = samples.prompt.shape, [lora_digest(lora) for lora in teachers.values()]
        loras = [lora for lora in made_from for _ in range(num_sources)]

        def render(wanted: Sequence[int], advance: Advance) -> Iterator[tuple[int, Tensor]]:
            return render_some_targets(wanted, self.adapter, teachers, samples, self.text, self.config, advance)

        keys = self._keys(samples, images, loras, target_seeds(self.config, num_effects * num_sources))
        return self._targets("render targets", keys, render).unflatten(0, (num_effects, num_sources))

    def of_base(self, samples: Samples, images: Sequence[str]) -> Tensor:
        """What the base makes of ``samples [Q]``, ``[Q, T, C]``."""

        def render(wanted: Sequence[int], advance: Advance) -> Iterator[tuple[int, Tensor]]:
            return render_some_general_targets(wanted, self.adapter, samples, self.text, self.config, advance)

        keys = self._keys(samples, images, [None] * len(images), general_seeds(self.config, len(images)))
        return self._targets("render general targets", keys, render)

    def _targets(self, title: str, keys: Sequence[Key], render: Render) -> Tensor:
        def make(missing: list[int]) -> Iterator[tuple[int, Entry]]:
            with stage(title, num_passes(self.config, len(missing))) as advance:
                for i, latents in render(missing, advance):
                    yield i, {"latents": latents}

        return torch.stack([entry["latents"] for entry in self.cache.entries("targets", keys, make)])

    def _keys(
        self, samples: Samples, images: Sequence[str], loras: Sequence[str | None], seeds: Sequence[int]
    ) -> list[Key]:
        shared = {
            "family": type(self.adapter).__name__,
            "pipeline": digest(self.components),
            "size": self.adapter.size,
            "max_sequence_length": self.adapter.max_sequence_length,
            "sampler": self.config.sampler.model_dump(mode="json", exclude=NO_TARGET_READS),
            "norm_rescale": self.config.objective.norm_rescale,
        }
        prompts = [self.table.prompt(row) for row in samples.prompt.flatten().tolist()]
        return [
            {**shared, "prompt": prompt, "image": image, "lora": lora, "seed": seed}
            for prompt, image, lora, seed in zip(prompts, images, loras, seeds, strict=True)
        ]


def lora_digest(state: LoRAState) -> str:
    """The hash of what a LoRA does, whatever file it came from."""
    factors = (
        (f"{name}.{side}", getattr(m, side)) for name, m in state.modules.items() for side in ("lora_A", "lora_B")
    )
    return tensor_digest(dict(factors))
