"""Settings of the demo: its effects, their prompts, the studio's guidance, and a budget that fits two cores."""

from __future__ import annotations

from collections.abc import Sequence

from clora.config.settings import DistillConfig, EffectConfig, make_trigger
from clora.studio.effects import EFFECTS
from clora.studio.scenes import SIZE
from clora.studio.text import MAX_SEQUENCE_LENGTH

GUIDANCE = 0.5
NUM_GENERAL = 192  # of the default run; the targets of these ship
FULL_GENERAL = 1536
DEFAULT_EFFECTS = ("negative", "thermal", "blueprint", "sepia", "scanlines", "leaves", "snow", "colour_static")
DEFAULT_MINUTES = 6.2
FULL_ANCHOR_UPDATES = 2500
FULL_MATCHING_UPDATES = 420  # one of these takes as long as seven to nine of those


def student_prompts(effect: str) -> tuple[str, ...]:
    """Returns the student's prompts for an effect: its trigger with a description, in three phrasings."""
    trigger = make_trigger(effect)
    texts = EFFECTS[effect]
    return (f"{trigger} {texts.description}", f"{trigger} {texts.prompt}", f"{texts.description} {trigger}")


def demo_config(effects: Sequence[str], seed: int, minutes: float | None = DEFAULT_MINUTES) -> DistillConfig:
    """Makes the demo's configuration for some of the studio's effects; ``minutes`` None is the full run.

    The full run anchors at a lower rate and draws more general rows: fast anchoring forgets general edits.
    """
    full = minutes is None
    full_updates = FULL_ANCHOR_UPDATES + FULL_MATCHING_UPDATES
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
            "student": {"rank": 64, "init": "merge"},
            "sampler": {"guidance": GUIDANCE},
            "objective": {"switch_probability": 0.7 if full else 0.75},
            "train": {
                # The default run ends by its minutes, the full one by its updates.
                "updates": full_updates if full else 100_000,
                "anchor_share": FULL_ANCHOR_UPDATES / full_updates if full else 0.6,
                "optimizer": "muon",
                "anchor_learning_rate": 4e-3 if full else 5e-3,
                "critic_ratio": 1,
                "batch_size": 8,
                "learning_rate": 5e-4,
                # As `clora.training.memory` would choose, but the same on every machine, since the last digits depend on it.
                "gradient_rows": 3,
                "critic_learning_rate": 6e-4,
                "minutes": minutes,
            },
            "seed": seed,
            # As the studio is loaded: the values of a seed would differ on CPUs with AMX, where ``auto`` is bfloat16.
            "dtype": "float32",
        }
    )
