"""The studio's library of effects: exact image functions, each with a name, a prompt and a description."""

from clora.studio.effects import colour, drawing, light, scattered, structure
from clora.studio.effects.registry import Effect

# The order is part of every seeded draw of an effect.
EFFECTS: dict[str, Effect] = colour.EFFECTS | drawing.EFFECTS | structure.EFFECTS | scattered.EFFECTS | light.EFFECTS

__all__ = ["EFFECTS", "Effect"]
