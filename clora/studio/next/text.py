"""The words that the tokenizer of the studio on photographs is trained on."""

from __future__ import annotations

import numpy as np

from clora.studio.next.edits import FAMILIES, sample_edit
from clora.studio.next.effects import EFFECTS
from clora.studio.next.scenes import make_scene
from clora.studio.text import effect_texts


def prompt_corpus(edits_per_family: int = 60) -> list[str]:
    """Draws the tokenizer's training sentences: general instructions, effect prompts and their descriptions."""
    rng = np.random.default_rng([0, 2])
    corpus = []
    for family in FAMILIES:
        corpus += [sample_edit(make_scene(i, min_objects=1), rng, family).instruction for i in range(edits_per_family)]
    for effect in EFFECTS.values():
        corpus += effect_texts(effect)
    return corpus
