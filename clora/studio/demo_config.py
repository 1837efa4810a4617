"""Settings of the demo: its effects, their prompts, the studio's guidance, and updates for a few minutes of two cores."""

from __future__ import annotations

from collections.abc import Sequence

from clora.config.settings import DistillConfig, EffectConfig, make_trigger
from clora.studio.effects import EFFECTS
from clora.studio.scenes import SIZE
from clora.studio.text import MAX_SEQUENCE_LENGTH

STEPS = 8
SHIFT = 3.0
TEACHER_STEPS = 40
GUIDANCE = 0.5
NUM_GENERAL = 128  # of the default run; the targets of these ship
FULL_GENERAL = 1536
DEFAULT_EFFECTS = ("thermal", "cyanotype", "night_vision", "pixelate", "gold_frame", "mirror", "snow", "bubbles")
ANCHOR_UPDATES, MATCHING_UPDATES = 650, 50
FULL_ANCHOR_UPDATES, FULL_MATCHING_UPDATES = 2500, 420


def student_prompts(effect: str) -> tuple[str, ...]:
    """Returns the student's prompts for an effect: its trigger with a description, in three phrasings."""
    trigger = make_trigger(effect)
    texts = EFFECTS[effect]
    return (f"{trigger} {texts.description}", f"{trigger} {texts.prompt}", f"{texts.description} {trigger}")


def demo_config(effects: Sequence[str], seed: int, full: bool = False) -> DistillConfig:
    """Makes the demo's configuration for some of the studio's effects.

    The short run draws more general rows: at its pace it forgets general edits sooner.
    """
    anchor = FULL_ANCHOR_UPDATES if full else ANCHOR_UPDATES
    updates = anchor + (FULL_MATCHING_UPDATES if full else MATCHING_UPDATES)
    return DistillConfig.model_validate(
        {
            "pipeline": "studio",
            "output": "clora-demo",
            "effects": tuple(
                EffectConfig(name=name, lora=name, prompt=EFFECTS[name].prompt, student_prompts=student_prompts(name))
                for name in effects
            ),
            "data": {
                "sources": "studio",
                "size": (SIZE, SIZE),
                "max_sequence_length": MAX_SEQUENCE_LENGTH,
                "general_instructions": ("studio",),
                "general_targets": FULL_GENERAL if full else NUM_GENERAL,
            },
            "student": {"rank": 64, "init": "least_squares"},
            "sampler": {"steps": STEPS, "shift": SHIFT, "teacher_steps": TEACHER_STEPS, "guidance": GUIDANCE},
            "objective": {"switch_probability": 0.7 if full else 0.55},
            "train": {
                "updates": updates,
                "anchor_share": anchor / updates,
                "optimizer": "muon",
                "anchor_learning_rate": 4e-3,
                "critic_ratio": 1,
                "batch_size": 8,
                "learning_rate": 5e-4,
                # As `clora.training.memory` would choose, but the same on every machine, since the last digits depend on it.
                "gradient_rows": 3,
                "critic_learning_rate": 6e-4,
            },
            "seed": seed,
            # As the studio is loaded: the values of a seed would differ on CPUs with AMX, where ``auto`` is bfloat16.
            "dtype": "float32",
        }
    )
