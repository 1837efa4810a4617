"""The studio's twelve teachers: effect LoRAs, each in one of the file formats that people have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clora.lora.load import load_lora
from clora.lora.state import LoRAState
from clora.models.families.flux2 import Flux2KleinAdapter


@dataclass(frozen=True)
class TeacherSpec:
    """One teacher: the rank and layers of its LoRA, and the format that it ships in."""

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
TEACHERS = tuple(spec.effect for spec in SPECS)


def teacher_path(studio: Path, effect: str) -> Path:
    """Returns the file or PEFT folder of an effect's LoRA in a built studio."""
    file = studio / "teachers" / f"{effect}.safetensors"
    return file if file.exists() else studio / "teachers" / effect


def load_teachers(adapter: Flux2KleinAdapter, studio: Path, effects: Iterable[str]) -> dict[str, LoRAState]:
    """Loads a built studio's teachers by effect."""
    return {effect: load_lora(teacher_path(studio, effect), adapter.pipeline) for effect in effects}
