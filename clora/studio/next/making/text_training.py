"""The sentences that the text encoder of the studio on photographs is trained on."""

from __future__ import annotations

import numpy as np

from clora.studio.making.text_training import EFFECT_SHARE, Meaning
from clora.studio.next.edits import FAMILIES, sample_edit
from clora.studio.next.effects import EFFECTS
from clora.studio.next.scenes import COLOURS, make_scene
from clora.studio.text import effect_texts


def draw_sentences(seed: int, count: int) -> list[tuple[str, Meaning]]:
    """Draws prompts of general edits and, one in four, of effects, each with its meaning."""
    rng = np.random.default_rng([seed, 8])
    sentences = []
    for _ in range(count):
        if rng.random() < EFFECT_SHARE:
            effect = EFFECTS[str(rng.choice(list(EFFECTS)))]
            text = str(rng.choice(effect_texts(effect)))
            sentences.append((text, (f"effect {effect.name}", "", "", "")))
        else:
            scene = make_scene(int(rng.integers(1 << 30)), min_objects=1)
            edit = sample_edit(scene, rng, str(rng.choice(list(FAMILIES))))
            # The first slot may hold a colour and a shape, or the noun of a cut-out, of one word or more.
            first, _, second = edit.slots[0].partition(" ")
            if first not in COLOURS:
                first, second = edit.slots[0], ""
            sentences.append((edit.instruction, (edit.family, first, second, edit.slots[1])))
    return sentences
