"""The files of the studio's teachers, each in one of the formats that people have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from clora.lora.families import FLUX2
from clora.lora.load import load_lora
from clora.lora.save import save_lora
from clora.lora.state import LoRAState
from clora.models.families.flux2 import Flux2KleinAdapter

KOHYA_ALPHA = 4.0


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher: the rank and layers of its LoRA, and the format that it ships in."""

    effect: str
    format: str
    rank: int
    attention_only: bool = False


def teacher_path(studio: Path, effect: str) -> Path:
    """Returns the file or PEFT folder of an effect's LoRA in a built studio."""
    file = studio / "teachers" / f"{effect}.safetensors"
    return file if file.exists() else studio / "teachers" / effect


def load_teachers(adapter: Flux2KleinAdapter, studio: Path, effects: Iterable[str]) -> dict[str, LoRAState]:
    """Loads a built studio's teachers by effect."""
    return {effect: load_lora(teacher_path(studio, effect), adapter.pipeline) for effect in effects}


def save_teacher(spec: TeacherSpec, state: LoRAState, folder: Path) -> Path:
    """Writes one teacher in its format under ``folder``; returns the file or folder that a user would point at."""
    path = folder / (spec.effect if spec.format == "peft" else f"{spec.effect}.safetensors")
    alpha = KOHYA_ALPHA if spec.format == "kohya" else None
    save_lora(state, path, spec.format, alpha=alpha, dtype=torch.float16, family=FLUX2)
    return path
