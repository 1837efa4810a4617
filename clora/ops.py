"""The numerical operations of clora; the only module that imports `csrc_triton`."""

from csrc_triton.coarse_to_fine.reference import (
    ANCHOR,
    BACKWARD_SIMULATION,
    TARGET_SIMULATION,
    Scores,
    coarse_to_fine_loss,
)
from csrc_triton.multi_lora.reference import multi_lora_linear

__all__ = [
    "ANCHOR",
    "BACKWARD_SIMULATION",
    "TARGET_SIMULATION",
    "Scores",
    "coarse_to_fine_loss",
    "multi_lora_linear",
]
