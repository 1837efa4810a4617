"""The demo's training data: scenes of the effect stream, pairs of the general stream, and the rendered targets of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import Tensor

from clora.config.settings import DistillConfig
from clora.data.batches import DistillData, EffectSamples
from clora.data.rendering import Samples, num_passes, render_targets
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Text
from clora.progress import stage
from clora.studio.assets import SEED, verified
from clora.studio.edits import Edit, sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.pixels import to_tensor
from clora.studio.scenes import make_scene, render

TARGETS = "targets.safetensors"
TARGET_SOURCES = 40
FIRST_TARGET_SCENE = 300_000_000
FIRST_GENERAL_SCENE = 400_000_000


@dataclass(frozen=True)
class Targets:
    """Rendered targets: ``[M, T, C]`` of each effect's sources, by its name; ``general [P, T, C]`` of general pairs."""

    effects: Mapping[str, Tensor]
    general: Tensor

    def serialise(self) -> bytes:
        """Returns the file's content: fp16 tensors, one for each effect under its name, and the general pairs'."""
        tensors = {f"effect.{name}": latents for name, latents in self.effects.items()} | {"general": self.general}
        return save({name: tensor.half().cpu().numpy() for name, tensor in tensors.items()})


def load_targets(folder: Path) -> Targets:
    """Reads the shipped targets, verified against the hash in the provenance."""
    # Stored in fp16, used in fp32.
    tensors = {name: torch.from_numpy(array).float() for name, array in load_file(verified(folder, TARGETS)).items()}
    general = tensors.pop("general")
    return Targets({name.removeprefix("effect."): latents for name, latents in tensors.items()}, general)


def target_sources(adapter: ModelAdapter) -> Tensor:
    """Encodes the sources of the effect stream, ``[M, T, C]``: the same scenes for every effect."""
    scenes = [make_scene(FIRST_TARGET_SCENE + i, "train") for i in range(TARGET_SOURCES)]
    return adapter.encode_images(to_tensor(np.stack([render(scene, adapter.size[0]) for scene in scenes])))


def general_pairs(adapter: ModelAdapter, count: int) -> tuple[Tensor, Text]:
    """Encodes the first ``count`` sources ``[P, T, C]`` of the general stream, and their instructions."""
    edits = [_general_edit(FIRST_GENERAL_SCENE + i, adapter.size[0]) for i in range(count)]
    sources = adapter.encode_images(to_tensor(np.stack([edit.source for edit in edits])))
    return sources, adapter.encode_prompts([edit.instruction for edit in edits])


def _general_edit(seed: int, size: int) -> Edit:
    return sample_edit(make_scene(seed, "train", 1), np.random.default_rng([SEED, seed, 7]), size=size)


def make_targets(adapter: ModelAdapter, loras: Mapping[str, LoRAState], config: DistillConfig) -> Targets:
    """Renders every teacher's targets of its sources, and the base's targets of the general pairs.

    They are the same for every seed of a training.
    """
    num_effects = len(loras)
    num_general = config.data.general_targets
    prompts = adapter.encode_prompts([EFFECTS[name].prompt for name in loras])
    general_sources, instructions = general_pairs(adapter, num_general)
    # Rows of the table of prompts: one for each effect, one for each general pair, last the empty prompt.
    text = Text.cat([prompts, instructions, adapter.encode_prompts([""])])
    effect_rows = torch.arange(num_effects)[:, None].expand(-1, TARGET_SOURCES)
    general_rows = num_effects + torch.arange(num_general)
    empty = torch.tensor(num_effects + num_general)
    sources = target_sources(adapter).expand(num_effects, -1, -1, -1)
    effects = Samples.of_teachers(sources, effect_rows, empty.expand_as(effect_rows), SEED)
    general = Samples.of_base(general_sources, general_rows, empty.expand_as(general_rows), SEED)
    with stage("render targets", num_passes(config, effect_rows.numel() + num_general)) as advance:
        latents = torch.stack(list(render_targets(adapter, loras, effects, text, config, advance)))
        of_base = torch.stack(list(render_targets(adapter, {}, general, text, config, advance)))
    # [E M, T, C], effect by effect.
    return Targets(dict(zip(loras, latents.split(TARGET_SOURCES), strict=True)), of_base)


def training_data(adapter: ModelAdapter, names: Sequence[str], config: DistillConfig, made: Targets) -> DistillData:
    """Encodes the training data of some effects, whose targets are made."""
    with stage("encode scenes and prompts", None):
        sources = target_sources(adapter)
        general_sources, general_text = general_pairs(adapter, len(made.general))
        teacher = adapter.encode_prompts([effect.prompt for effect in config.effects])
        student = adapter.encode_prompts(list(chain.from_iterable(effect.student_prompts for effect in config.effects)))
    # The table of prompts is these four parts, one after the other; each gets its rows of it.
    parts = [teacher, student, general_text, adapter.encode_prompts([""])]
    teacher_rows, student_rows, general_rows, empty_row = torch.arange(sum(map(len, parts))).split([*map(len, parts)])
    phrasings = student_rows.split([len(effect.student_prompts) for effect in config.effects])
    samples = [
        EffectSamples(name, sources, made.effects[name], row, asked[:, None], empty_row)
        for name, row, asked in zip(names, teacher_rows[:, None], phrasings, strict=True)
    ]
    pairs = torch.stack([torch.arange(len(general_rows)), general_rows, empty_row.expand_as(general_rows)], 1)
    return DistillData.of(Text.cat(parts), samples, general_sources, pairs, made.general)
