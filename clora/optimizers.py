"""The optimizers of student and critic."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clora.errors import CloraError
from clora.muon import Muon

ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.0}


def make_optimizer(name: str, parameters: Sequence[Tensor], learning_rate: float, bits: int) -> torch.optim.Optimizer:
    """``adamw`` or ``muon``, without weight decay.

    Args:
        name: as in ``train.optimizer``.
        parameters: fp32 factors.
        learning_rate: its first value.
        bits: of AdamW's states: 32, or 8 by bitsandbytes (2 bytes a parameter for 8); Muon's are of 32 bits.

    Raises:
        CloraError: bitsandbytes is not installed, or cannot compute on the parameters' device.
    """
    if name == "muon":
        return Muon(parameters, learning_rate, weight_decay=0.0)
    if bits == 8:
        return _adamw_of_8_bits(parameters, learning_rate)
    return torch.optim.AdamW(parameters, learning_rate, **ADAMW)


def _adamw_of_8_bits(parameters: Sequence[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise CloraError(
            "train.optimizer_bits: 8 needs bitsandbytes; pip install bitsandbytes, or choose 32"
        ) from error
    device = parameters[0].device
    probe = torch.zeros(8192, device=device, requires_grad=True)  # smaller tensors keep states of 32 bits
    probe.grad = torch.ones_like(probe)
    try:
        AdamW8bit([probe], learning_rate, **ADAMW).step()
    except (AttributeError, NotImplementedError, RuntimeError) as error:  # what it raises differs between releases
        raise CloraError(
            f"train.optimizer_bits: the installed bitsandbytes cannot train on {device} ({error}); upgrade it, train on "
            "a GPU, or choose 32"
        ) from error
    return AdamW8bit(parameters, learning_rate, **ADAMW)
