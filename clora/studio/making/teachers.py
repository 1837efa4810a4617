"""The studio's teachers: twelve effect LoRAs, trained from 20 pairs each, in the file formats that people have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clora.bank.bank import AdapterBank
from clora.lora.families import FLUX2
from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora
from clora.lora.save import save_comfyui, save_diffusers_lora, save_kohya, save_peft_folder
from clora.lora.state import LoRAState, fresh_lora
from clora.models import linear_names
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.effects import EFFECTS
from clora.studio.making.lora_training import Pairs, train_loras
from clora.studio.making.vae import to_tensor
from clora.studio.scenes import make_scene, render

FIRST_SCENE = 200_000_000
PAIRS = 20
UPDATES = 700
TRAINING = {"rows_per_lora": 2, "learning_rate": 2e-3, "shift": 2.0}


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher: the rank and layers of its LoRA, and the format it is shipped in."""

    effect: str
    format: str
    rank: int
    attention_only: bool = False


SPECS = (
    TeacherSpec("negative", "diffusers", 16),
    TeacherSpec("thermal", "kohya", 16),
    TeacherSpec("blueprint", "comfyui", 16),
    TeacherSpec("sepia", "peft", 8, attention_only=True),
    TeacherSpec("gold_frame", "diffusers", 16),
    TeacherSpec("scanlines", "kohya", 12),
    TeacherSpec("vignette", "peft", 12),
    TeacherSpec("night_vision", "comfyui", 16),
    TeacherSpec("leaves", "diffusers", 16),
    TeacherSpec("fireflies", "peft", 16),
    TeacherSpec("snow", "comfyui", 16),
    TeacherSpec("colour_static", "kohya", 16),
)
KOHYA_ALPHA = 4.0


def teacher_scenes(spec: TeacherSpec) -> list[int]:
    """Scene seeds of a teacher's training pairs; no other teacher and no evaluation uses them."""
    return [FIRST_SCENE + 1000 * SPECS.index(spec) + i for i in range(PAIRS)]


def encode_pairs(adapter: Flux2KleinAdapter, specs: Sequence[TeacherSpec]) -> Pairs:
    """The training pairs of some teachers, encoded."""
    sources, targets = [], []
    for spec in specs:
        images = [render(make_scene(seed)) for seed in teacher_scenes(spec)]
        rng = np.random.default_rng([SPECS.index(spec), 4])
        results = [EFFECTS[spec.effect].apply(image, rng) for image in images]
        sources.append(adapter.encode_images(to_tensor(np.stack(images))))
        targets.append(adapter.encode_images(to_tensor(np.stack(results))))
    text = adapter.encode_prompts([EFFECTS[spec.effect].prompt for spec in specs])
    return Pairs(torch.stack(sources), torch.stack(targets), text)


def train_teachers(
    adapter: Flux2KleinAdapter,
    specs: Sequence[TeacherSpec],
    seed: int,
    report: Callable[[int, Mapping[str, float]], None],
) -> dict[str, LoRAState]:
    """Trains teachers together, in routed batches; returns effect name to LoRA."""
    transformer = adapter.pipeline.transformer
    fresh = _fresh(transformer, specs, torch.Generator().manual_seed(seed))
    with AdapterBank(transformer, fresh, dtype=torch.float32) as bank:
        train_loras(
            adapter,
            bank,
            bank.slots(trainable=True),
            encode_pairs(adapter, specs),
            updates=UPDATES,
            seed=seed,
            report=report,
            **TRAINING,
        )
        return {spec.effect: _own_part(bank.state(spec.effect, spec.rank), fresh[spec.effect]) for spec in specs}


def _fresh(transformer, specs: Sequence[TeacherSpec], generator: torch.Generator) -> dict[str, LoRAState]:
    targets = linear_names(transformer)
    attention = [name for name in targets if ".attn." in name]
    shapes = linear_shapes(transformer)
    return {s.effect: fresh_lora(shapes, s.rank, generator, attention if s.attention_only else targets) for s in specs}


def _own_part(state: LoRAState, fresh: LoRAState) -> LoRAState:
    """The modules that a LoRA adapts, without those that other slots of the bank brought in."""
    return LoRAState({name: state.modules[name] for name in fresh.modules})


def save_teacher(spec: TeacherSpec, state: LoRAState, folder: Path) -> Path:
    """Writes one teacher in its format under ``folder``; returns the file or folder a user would point at."""
    if spec.format == "peft":
        save_peft_folder(state, folder / spec.effect, dtype=torch.float16)
        return folder / spec.effect
    path = folder / f"{spec.effect}.safetensors"
    if spec.format == "kohya":
        save_kohya(state, path, KOHYA_ALPHA, dtype=torch.float16, family=FLUX2)
    elif spec.format == "comfyui":
        save_comfyui(state, path, dtype=torch.float16, family=FLUX2)
    else:
        save_diffusers_lora(state, path, dtype=torch.float16)
    return path


def teacher_path(folder: Path, effect: str) -> Path:
    """Where ``save_teacher`` put an effect's LoRA."""
    file = folder / f"{effect}.safetensors"
    return file if file.exists() else folder / effect


def load_teachers(adapter: Flux2KleinAdapter, folder: Path, effects: list[str]) -> dict[str, LoRAState]:
    """Reads shipped teachers; effect name to LoRA."""
    shapes = linear_shapes(adapter.pipeline.transformer)
    return {effect: read_lora(teacher_path(folder, effect), shapes) for effect in effects}
