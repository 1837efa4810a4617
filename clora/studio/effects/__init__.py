"""The studio's library of effects: exact image functions, each with a name, a prompt and a description."""

from clora.studio.effects import colour, drawing, stochastic, structure
from clora.studio.effects._registry import Effect

EFFECTS: dict[str, Effect] = {
    effect.name: effect for module in (colour, drawing, structure, stochastic) for effect in module.EFFECTS
}

__all__ = ["EFFECTS", "Effect"]
