"""The optimizers of student and critic, and the student's moving average."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clora.errors import CloraError

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def make_optimizer(
    name: str, parameters: Sequence[Tensor], learning_rate: float, bits: int, weight_decay: float = 0.0
) -> torch.optim.Optimizer:
    """``adamw`` or ``muon``.

    Args:
        name: as in ``train.optimizer``.
        parameters: fp32 factors.
        learning_rate: its first value.
        bits: of AdamW's states: 32, or 8 by bitsandbytes (2 bytes per parameter instead of 8). Muon's states are fp32.
        weight_decay: every step multiplies the factors by 1 minus its product with the learning rate.

    Raises:
        CloraError: bitsandbytes is not installed, or cannot compute on the parameters' device.
    """
    if name == "muon":
        return Muon(parameters, learning_rate, weight_decay=weight_decay)
    if bits == 8:
        return _adamw_of_8_bits(parameters, learning_rate, weight_decay)
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)


def make_average(parameters: Sequence[Tensor], decay: float | None) -> EMAModel | None:
    """diffusers' moving average of parameters, which follows them closely at first; None for a decay of None."""
    from diffusers.training_utils import EMAModel

    return None if decay is None else EMAModel(parameters, decay=decay, foreach=True)


def _adamw_of_8_bits(parameters: Sequence[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise CloraError(
            "train.optimizer_bits: 8 needs bitsandbytes; pip install bitsandbytes, or choose 32"
        ) from error
    device = parameters[0].device
    # A step on a probe finds out whether its kernels run here; it must be large, since small tensors keep 32 bits.
    probe = torch.zeros(8192, device=device, requires_grad=True)
    probe.grad = torch.ones_like(probe)
    try:
        AdamW8bit([probe], learning_rate).step()
    except (AttributeError, NotImplementedError, RuntimeError) as error:  # the error differs between releases
        raise CloraError(
            f"train.optimizer_bits: the installed bitsandbytes cannot train on {device} ({error}); upgrade it, train on "
            "a GPU, or choose 32"
        ) from error
    return AdamW8bit(parameters, learning_rate, weight_decay=weight_decay)


# Muon in float32: momentum whose matrix is made orthogonal before each step (Jordan et al., 2024). ``torch.optim.Muon``
# does this in bfloat16, which a CPU without bfloat16 units computes so slowly that an update of the studio's base takes
# three times as long, and it takes no stacks of matrices. Measured against AdamW: the base's loss after 200 updates was
# .586 instead of .629, and the demo's student needed half the updates.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For weight matrices ``[M, N]`` or stacks of them ``[..., M, N]``.

    A step has the root mean square of an AdamW step of the same learning rate.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            # Parameters of one shape form one stack: a few large products instead of many small ones.
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                # An orthogonal [M, N] matrix has the root mean square max(M, N) ** -0.5, an AdamW step about 0.2.
                rate = 0.2 * group["lr"] * max(shape[-2:]) ** 0.5
                directions = [_direction(p, self.state[p], group["momentum"]) for p in parameters]
                steps = orthogonalized(torch.stack(directions)).unbind()
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(parameters, list(steps), alpha=rate)


def _direction(parameter: Tensor, state: dict[str, Tensor], momentum: float) -> Tensor:
    """The gradient with Nesterov's momentum, whose running mean is kept in ``state``."""
    if "momentum" not in state:
        state["momentum"] = torch.zeros_like(parameter)
    buffer = state["momentum"]
    buffer.lerp_(parameter.grad, 1 - momentum)
    return parameter.grad.lerp(buffer, momentum)


def orthogonalized(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Matrices ``[..., M, N]`` with all singular values brought near 1, by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    # Divided by the Frobenius norm no singular value s is above 1, and every iteration takes each to a s + b s^3 + c s^5,
    # which brings them near 1 and keeps the singular vectors: x -> P x with P = a + b G + c G^2 of the Gram matrix
    # G = x x'. P commutes with G, so that the next Gram matrix is P G P. All iterations are done on these, whose side is
    # the rank, and x is multiplied once by the product of all P: two large products, not two for each iteration.
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    gram = x @ x.mT
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-14)  # of the Frobenius norm
    gram = gram / square
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    whole = identity / square.sqrt()
    for _ in range(iterations):
        step = a * identity + b * gram + c * gram @ gram
        whole = step @ whole
        gram = step @ gram @ step
    x = whole @ x
    return x if wide else x.mT
