"""Inputs of a linear case, its result in fp64 and in eager PyTorch.

Legend: B samples, T tokens, K inputs, N outputs, E adapters, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import LinearCase, adapter_of

Outputs = dict[str, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""y from (x, lora_A, lora_B)."""


@dataclass(frozen=True)
class LinearInputs:
    """Tensors of a case, all of its dtype but the ids.

    Attributes:
        x: `[B, T, K]`; requires a gradient in mode "student", as do lora_A and lora_B.
        weight: `[N, K]`.
        bias: `[N]` or None.
        lora_A: `[E, R, K]`.
        lora_B: `[E, N, R]`.
        scales: of each adapter, on the host.
        ids: the adapter of each sample, on the host.
        upstream: gradient of y `[B, T, N]` in mode "student", else None.
    """

    case: LinearCase
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    scales: tuple[float, ...]
    ids: tuple[int, ...]
    upstream: Tensor | None

    @property
    def scale(self) -> Tensor:
        """`[E]` fp32 on x's device."""
        return torch.tensor(self.scales, device=self.x.device)

    @property
    def adapter_ids(self) -> Tensor:
        """`[B]` int32 on x's device."""
        return torch.tensor(self.ids, dtype=torch.int32, device=self.x.device)


def make_inputs(case: LinearCase, device: torch.device, seed: int = 0) -> LinearInputs:
    """Random tensors; base and adapter contribute to y alike, so that an error of either shows.

    The first adapter's scale is 1, where compilers may drop the multiplication; the others' differ.
    """
    generator = torch.Generator(device).manual_seed(seed)
    k, n, e, r = case.in_features, case.out_features, case.adapters, case.rank

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))
        return values.mul_(std)

    trains = case.mode == "student"
    return LinearInputs(
        case=case,
        x=draw(case.samples, case.tokens, k).requires_grad_(trains),
        weight=draw(n, k, std=k**-0.5),
        bias=draw(n) if case.bias else None,
        lora_A=draw(e, r, k, std=k**-0.5).requires_grad_(trains),
        lora_B=draw(e, n, r, std=r**-0.5).requires_grad_(trains),
        scales=tuple(1 + 0.25 * i for i in range(e)),
        ids=tuple(adapter_of(case)),
        upstream=draw(case.samples, case.tokens, n) if trains else None,
    )


def run(inputs: LinearInputs, forward: Forward) -> Outputs:
    """One call: y, and in mode "student" the gradients of x, lora_A and lora_B."""
    if inputs.upstream is None:
        with torch.no_grad():
            return {"y": forward(inputs.x, inputs.lora_A, inputs.lora_B)}
    leaves = (inputs.x, inputs.lora_A, inputs.lora_B)
    y = forward(*leaves)
    gradients = torch.autograd.grad(y, leaves, inputs.upstream)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=True))}


def expected(inputs: LinearInputs) -> Outputs:
    """The result in fp64: every sample on its own merged weight, and differentiated through it."""
    trains = inputs.upstream is not None
    x, a, b = (t.detach().double().requires_grad_(trains) for t in (inputs.x, inputs.lora_A, inputs.lora_B))
    weight = inputs.weight.double()
    bias = None if inputs.bias is None else inputs.bias.double()
    with torch.set_grad_enabled(trains):
        merged = [weight + scale * b[e] @ a[e] for e, scale in enumerate(inputs.scales)]
        y = torch.stack([F.linear(x[i], merged[e], bias) for i, e in enumerate(inputs.ids)])
    if not trains:
        return {"y": y}
    gradients = torch.autograd.grad(y, (x, a, b), inputs.upstream.double())
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=True))}


def eager(inputs: LinearInputs) -> Outputs:
    """The result of clora's eager definition in the dtype of the case."""
    from clora.ops import multi_lora_linear

    scale, ids = inputs.scale, inputs.adapter_ids
    return run(
        inputs,
        lambda x, a, b: multi_lora_linear(x, inputs.weight, inputs.bias, a, b, scale, ids, backend="eager"),
    )
