"""The studio's fifty teachers: effect LoRAs, each in one of the file formats that people have."""

from __future__ import annotations

from collections.abc import Sequence

from clora.errors import CloraError, nearest
from clora.studio.effects import EFFECTS
from clora.studio.teacher_files import TeacherSpec

COLOUR_MAPS = (
    "darkroom",
    "thermal",
    "sepia",
    "night_vision",
    "greyscale",
    "cyanotype",
    "cross_process",
    "sunset",
    "rainbow",
    "vignette",
)
"""Effects in which a pixel depends on its own colour and, smoothly, on its place (but for thermal's slight blur)."""
PAIRS = {"colour": 20, "spatial": 100, "stochastic": 100}
"""Before/after pairs that a teacher is trained on, by its effect's kind: 20 are what real LoRAs have."""

# Those of the demo are in the first two groups that are trained together.
SPECS = (
    TeacherSpec("darkroom", "diffusers", 8),
    TeacherSpec("thermal", "kohya", 12),
    TeacherSpec("sepia", "peft", 8, attention_only=True),
    TeacherSpec("night_vision", "comfyui", 12),
    TeacherSpec("greyscale", "diffusers", 8, attention_only=True),
    TeacherSpec("cyanotype", "kohya", 12),
    TeacherSpec("cross_process", "peft", 8, attention_only=True),
    TeacherSpec("sunset", "comfyui", 12),
    TeacherSpec("rainbow", "diffusers", 12),
    TeacherSpec("vignette", "kohya", 8, attention_only=True),
    TeacherSpec("lamp_wall", "diffusers", 16),
    TeacherSpec("pixelate", "peft", 12),
    TeacherSpec("gold_frame", "peft", 12),
    TeacherSpec("mirror", "peft", 12),
    TeacherSpec("snow", "kohya", 12),
    TeacherSpec("bubbles", "comfyui", 12),
    TeacherSpec("moonlight", "peft", 16),
    TeacherSpec("pencil_sketch", "comfyui", 16),
    TeacherSpec("frost", "kohya", 12),
    TeacherSpec("torn_paper", "peft", 16),
    TeacherSpec("emboss", "comfyui", 12),
    TeacherSpec("oil_paint", "diffusers", 16),
    TeacherSpec("stained_glass", "kohya", 12),
    TeacherSpec("toy_bricks", "comfyui", 12),
    TeacherSpec("scanlines", "diffusers", 12),
    TeacherSpec("ribbed_glass", "kohya", 12),
    TeacherSpec("instant_photo", "comfyui", 12),
    TeacherSpec("film_strip", "diffusers", 12),
    TeacherSpec("porthole", "kohya", 12),
    TeacherSpec("water_reflection", "comfyui", 12),
    TeacherSpec("underwater", "diffusers", 12),
    TeacherSpec("light_leak", "peft", 12),
    TeacherSpec("lens_flare", "diffusers", 12),
    TeacherSpec("fog", "kohya", 12),
    TeacherSpec("laser_beams", "comfyui", 12),
    TeacherSpec("broken_glass", "kohya", 16),
    TeacherSpec("rain", "peft", 12),
    TeacherSpec("rain_drops", "comfyui", 12),
    TeacherSpec("leaves", "diffusers", 12),
    TeacherSpec("confetti", "kohya", 12),
    TeacherSpec("hearts", "peft", 12),
    TeacherSpec("daisies", "diffusers", 12),
    TeacherSpec("paint_drops", "kohya", 12),
    TeacherSpec("fireflies", "comfyui", 12),
    TeacherSpec("glitter", "peft", 12),
    TeacherSpec("fireworks", "peft", 12),
    TeacherSpec("bokeh", "comfyui", 12),
    TeacherSpec("colour_static", "diffusers", 12),
    TeacherSpec("film_grain", "diffusers", 12),
    TeacherSpec("dust_scratches", "kohya", 12),
)
TEACHERS = tuple(spec.effect for spec in SPECS)


def check_effects(names: Sequence[str]) -> list[str]:
    """Returns each name once. Raises CloraError with the nearest name where the studio has no teacher."""
    for name in names:
        if name not in TEACHERS:
            known = f"the studio has teachers for {list(TEACHERS)}{nearest(name, TEACHERS)}"
            raise CloraError(f"unknown effect {name!r}; {known}")
    return list(dict.fromkeys(names))


def kind_of(effect: str) -> str:
    """Returns "colour", "spatial" or "stochastic": how much a teacher has to learn, and how it is measured."""
    if EFFECTS[effect].stochastic:
        return "stochastic"
    return "colour" if effect in COLOUR_MAPS else "spatial"
