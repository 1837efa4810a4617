"""Optimizers and learning rates of the studio's training, and how one that was stopped goes on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from clora.training.checkpoint import load_state
from clora.training.optimizers import Muon
from clora.training.resume import check_same

RATES = {"matrices": 3e-3, "rest": 1.5e-3}


def make_optimizers(parameters: dict[str, Tensor]) -> dict[str, torch.optim.Optimizer]:
    """Makes Muon for the matrices of the blocks, AdamW for embeddings, modulation, biases, norms and the output."""
    matrices, rest = [], []
    for name, parameter in parameters.items():
        (matrices if parameter.ndim == 2 and "transformer_blocks" in name else rest).append(parameter)
    return {
        "matrices": Muon(matrices, RATES["matrices"]),
        "rest": torch.optim.AdamW(rest, RATES["rest"], betas=(0.9, 0.98), weight_decay=0.01),
    }


def rate_factor(update: int, updates: int, warmup: float, decay: float) -> float:
    """Returns the factor of a learning rate: linear warm-up over updates, flat, linear decay to zero over the last share."""
    return min((update + 1) / warmup, 1.0, (updates - update) / (decay * updates))


def resume(checkpoint: Path, state: dict[str, Tensor], optimizers, generator, recipe: dict[str, object]) -> int:
    """Restores a run in place and returns its next update; 0 without a checkpoint. Refuses one of another recipe."""
    if not checkpoint.exists():
        return 0
    tensors, values = load_state(checkpoint, optimizers, generator)
    check_same(values.get("recipe", {}), recipe, checkpoint)
    for name, tensor in state.items():
        tensor.copy_(tensors[name])
    return values["update"]
