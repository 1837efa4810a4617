"""Settings of the demo: which effects, the studio's guidance, and a budget that fits two cores."""

from __future__ import annotations

from collections.abc import Sequence

from clora.config.settings import DistillConfig, EffectConfig
from clora.studio.assets import student_prompts
from clora.studio.effects import EFFECTS
from clora.studio.scenes import SIZE
from clora.studio.text import MAX_SEQUENCE_LENGTH

GUIDANCE = 0.5
NUM_GENERAL, FULL_GENERAL = 192, 1536  # the first are shipped
DEFAULT_EFFECTS = ("negative", "thermal", "blueprint", "sepia", "scanlines", "leaves", "snow", "colour_static")
DEFAULT_MINUTES = 6.2
FULL_ANCHOR_UPDATES, FULL_MATCHING_UPDATES = 2500, 420  # one of these takes the time of seven to nine of those


def demo_config(effects: Sequence[str], seed: int, minutes: float | None = DEFAULT_MINUTES) -> DistillConfig:
    """The demo's configuration for some of the studio's effects; ``minutes`` None is the full run.

    The full run anchors at a lower rate and draws more general rows: fast anchoring forgets general edits.
    """
    full, full_updates = minutes is None, FULL_ANCHOR_UPDATES + FULL_MATCHING_UPDATES
    return DistillConfig.model_validate(
        {
            "pipeline": "studio",
            "output": "clora-demo",
            "effects": tuple(_effect(name) for name in effects),
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
                "updates": full_updates if full else 100_000,
                "anchor_share": FULL_ANCHOR_UPDATES / full_updates if full else 0.6,
                "optimizer": "muon",
                "anchor_learning_rate": 4e-3 if full else 5e-3,
                "critic_ratio": 1,
                "batch_size": 8,
                "learning_rate": 5e-4,
                "critic_learning_rate": 6e-4,
                "minutes": minutes,
            },
            "seed": seed,
        }
    )


def _effect(name: str) -> EffectConfig:
    return EffectConfig(name=name, lora=name, prompt=EFFECTS[name].prompt, student_prompts=student_prompts(name))
