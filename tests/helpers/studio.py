"""Random teachers of the studio, which change the picture, without a training."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from clora.lora.state import LoRAState
from clora.studio.making.teachers import fresh_loras
from clora.studio.teachers import SPECS, TEACHERS


def random_teachers(transformer, names: Iterable[str]) -> dict[str, LoRAState]:
    """Makes teachers of the library with random ``lora_B``."""
    generator = torch.Generator().manual_seed(0)
    states = fresh_loras(transformer, [SPECS[TEACHERS.index(name)] for name in names], generator)
    for state in states.values():
        for module in state.modules.values():
            module.lora_B.normal_(std=0.02, generator=generator)
    return states
