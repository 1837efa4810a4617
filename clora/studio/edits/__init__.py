"""General edits: what the studio's base model can do, each with its exact result from the scene graph.

The base is trained on these, and the general stream of the distillation uses them. They give it the skills that effects
are made of (tones, channels, edges, relief, blur, grids, scattered marks). But for `blocks` and `grey`, which are those of the
effects pixelate and greyscale, they share no outcome with the effect library.
Several have random outcomes, so that the base has learned to make up texture.
"""

from __future__ import annotations

import numpy as np

from clora.studio.edits import drawing, objects, scattering, tones
from clora.studio.edits.registry import Edit, Family, Source
from clora.studio.photographs import Photographs, load_photographs
from clora.studio.scenes import SIZE, Scene, render

# The order is part of every seeded draw of an edit.
FAMILIES: dict[str, Family] = tones.FAMILIES | drawing.FAMILIES | objects.FAMILIES | scattering.FAMILIES


def sample_edit(
    scene: Scene,
    rng: np.random.Generator,
    family: str | None = None,
    size: int = SIZE,
    photographs: Photographs | None = None,
) -> Edit:
    """Draws an edit of the scene at a size.

    Args:
        family: fixes its kind, which must be one that the scene allows.
        photographs: with the cut-outs that can be added; None for those that ship.
    """
    names = [name for name, kind in FAMILIES.items() if scene.objects or not kind.of_objects]
    shares = np.array([FAMILIES[name].share for name in names])
    name = family or str(rng.choice(names, p=shares / shares.sum()))
    kind = FAMILIES[name]
    source = Source(scene, render(scene, size), rng, photographs or load_photographs())
    result, a, b = kind.apply(source)
    instruction = str(rng.choice(kind.phrasings)).format(a=a, b=b)
    return Edit(name, instruction, source.image, np.clip(result, 0, 1).astype(np.float32), (a, b))


__all__ = ["FAMILIES", "Edit", "Family", "sample_edit"]
