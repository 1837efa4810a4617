"""A linear layer with adapters: inputs, the result in fp64 and in eager PyTorch, and ways to compute it.

Each provider gets the stacked adapters and their ids, as a batch of the trainer has them.
Legend: B samples, T tokens, K inputs, N outputs, E adapters, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import LinearCase, adapter_of
from bench.providers import BASE, OURS, Builder, Call, Outputs, Unavailable, compiled, need_gpu, peft_model
from clora.ops import multi_lora_linear, runs_of
from csrc_triton.multi_lora.designs import DESIGNS

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

    @cached_property
    def scale(self) -> Tensor:
        """`[E]` fp32 on x's device."""
        return torch.tensor(self.scales, device=self.x.device)

    @cached_property
    def adapter_ids(self) -> Tensor:
        """`[B]` int32 on x's device."""
        return torch.tensor(self.ids, dtype=torch.int32, device=self.x.device)

    @cached_property
    def routing(self) -> dict:
        """What the host knows of the batch and its adapters, as options of the op; nothing of an adapter that trains."""
        strengths = None
        if self.upstream is None:
            pairs = zip(self.scales, self.lora_A.detach().double(), self.lora_B.detach().double(), strict=True)
            size = self.weight.double().norm()
            strengths = tuple(float(abs(scale) * (b @ a).norm() / size) for scale, a, b in pairs)
        return {"runs": runs_of(self.ids), "strengths": strengths}

    def base(self, x: Tensor) -> Tensor:
        """The output of the layer without adapters, in a new tensor."""
        return F.linear(x, self.weight, self.bias)

    def arguments(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> tuple:
        """The arguments of `clora.ops.multi_lora_linear`."""
        return x, self.weight, self.bias, lora_A, lora_B, self.scale, self.adapter_ids

    def layer(self) -> nn.Linear:
        """The same as a frozen module, nothing copied."""
        n, k = self.weight.shape
        layer = nn.Linear(k, n, bias=self.bias is not None, device="meta")
        layer.weight = _frozen(self.weight)
        if self.bias is not None:
            layer.bias = _frozen(self.bias)
        return layer


def make_inputs(case: LinearCase, device: torch.device, seed: int = 0) -> LinearInputs:
    """Random tensors; base and adapter contribute to y alike, so that an error of either shows.

    The first adapter's scale is 1, where compilers may drop the multiplication; the others' differ.
    """
    generator = torch.Generator(device).manual_seed(seed)
    k, n, e, r = case.in_features, case.out_features, case.adapters, case.rank

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=getattr(torch, case.dtype))
        return values.mul_(std)

    # Deviations of K^-1/2 and R^-1/2 keep all products at the scale of x.
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


def by(inputs: LinearInputs, op: Callable[..., Tensor], **options) -> Call:
    """A call of an op that takes the `arguments` of the inputs."""
    return partial(run, inputs, lambda *leaves: op(*inputs.arguments(*leaves), **options))


def expected(inputs: LinearInputs) -> Outputs:
    """The result in fp64: every sample's base and its adapter's delta as one matrix, and differentiated through both."""
    upcast = {}
    for field in fields(inputs):
        if isinstance(value := getattr(inputs, field.name), Tensor):
            upcast[field.name] = value.detach().double().requires_grad_(value.requires_grad)
    exact = replace(inputs, **upcast)

    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        # [N, K] of each adapter: autograd differentiates through the merged matrix, unlike any provider.
        deltas = [scale * lora_B[e] @ lora_A[e] for e, scale in enumerate(inputs.scales)]
        rows = zip(exact.base(x), x, inputs.ids, strict=True)
        return torch.stack([y + F.linear(row, deltas[e]) for y, row, e in rows])

    return run(exact, forward)


def eager(inputs: LinearInputs) -> Outputs:
    """The result of clora's eager definition in the dtype of the case."""
    return by(inputs, multi_lora_linear, backend="eager")()


def providers(case: LinearCase) -> dict[str, Builder]:
    """Name to builder of every provider that can compute the case's mode and number of adapters."""
    found = {BASE: base, "baddbmm": baddbmm, **peft_providers(case)}
    if case.adapters == 1:
        found["unsloth_style"] = unsloth_style
    if case.mode == "forward":
        found |= {"grouped_mm": grouped_mm, "merged": merged_per_sample}
    found[OURS] = ours
    found |= {f"{OURS}_{design}": partial(ours_design, design=design) for design in DESIGNS}
    if case.mode == "student":
        found["ours_fp32_factors"] = lambda inputs: ours(with_fp32_factors(inputs))
    return found


def peft_providers(case: LinearCase) -> dict[str, Builder]:
    """PEFT's way to compute the case, plain and under torch.compile."""
    name = "peft" if case.adapters == 1 else "peft_mixed"
    builder = peft_student if case.mode == "student" else peft
    return {name: builder, f"{name}_compiled": partial(builder, compile=True)}


def base(inputs: LinearInputs) -> Call:
    """Only the linear layer; in mode "student" with the gradient of x."""

    def call() -> Outputs:
        with torch.set_grad_enabled(inputs.upstream is not None):
            y = inputs.base(inputs.x)
        if inputs.upstream is None:
            return {"y": y}
        # The weight is frozen: this backward pass is one product.
        return {"y": y.detach(), "dx": torch.autograd.grad(y, inputs.x, inputs.upstream)[0]}

    return call


def ours(inputs: LinearInputs) -> Call:
    """`clora.ops.multi_lora_linear`, which chooses backend and design itself."""
    return by(inputs, multi_lora_linear, **inputs.routing)


def ours_design(inputs: LinearInputs, design: str) -> Call:
    """The op, forced to one of its designs."""
    if design == "fused":  # a kernel; the others have PyTorch's way, too
        need_gpu(inputs.x)
    return by(inputs, multi_lora_linear, design=design, **inputs.routing)


def with_fp32_factors(inputs: LinearInputs) -> LinearInputs:
    """The same with fp32 factors and gradients over the 16-bit base: as the trainer has them."""
    a, b = (factor.detach().float().requires_grad_() for factor in (inputs.lora_A, inputs.lora_B))
    return replace(inputs, lora_A=a, lora_B=b)


def peft(inputs: LinearInputs, compile: bool = False) -> Call:
    """PEFT's layer with its one active adapter, or with an adapter name per sample."""
    layer = _peft_layer(inputs).eval()
    forward = layer
    if inputs.case.adapters > 1:
        names = [f"a{e}" for e in inputs.ids]
        forward = lambda x: layer(x, adapter_names=names)  # noqa: E731
    if compile:
        forward = compiled(forward)
    return partial(run, inputs, lambda x, a, b: forward(x))


def peft_student(inputs: LinearInputs, compile: bool = False) -> Call:
    """PEFT's layer in training: its parameters are the case's factors, so that their gradients are the case's."""
    layer = _peft_layer(inputs).train()
    forward = compiled(layer) if compile else layer
    leaves = (inputs.x, layer.lora_A["a0"].weight, layer.lora_B["a0"].weight)

    def call() -> Outputs:
        y = forward(inputs.x)
        dx, da, db = torch.autograd.grad(y, leaves, inputs.upstream)
        # PEFT holds one adapter: its gradients get the dimension E.
        return {"y": y.detach(), "dx": dx, "dA": da[None], "dB": db[None]}

    return call


def baddbmm(inputs: LinearInputs) -> Call:
    """Only cuBLAS: the base layer, then a batched product per factor, the second added in place."""
    scale, ids = inputs.scale.to(inputs.x.dtype), inputs.adapter_ids

    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        # Each sample's factors, [B, R, K] and [B, N, R].
        a, b = (factor.index_select(0, ids) for factor in (lora_A, lora_B))
        low = torch.bmm(x, a.mT) * scale.index_select(0, ids)[:, None, None]
        return inputs.base(x).baddbmm_(low, b.mT)

    return partial(run, inputs, forward)


def grouped_mm(inputs: LinearInputs) -> Call:
    """`grouped_mm` over the rows sorted by adapter, added to the base layer."""
    need_gpu(inputs.x)
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise Unavailable(f"torch {torch.__version__} has no grouped_mm")
    # The routing, once per batch: samples in the order of their adapters, and the last row of each adapter's group.
    order = sorted(range(len(inputs.ids)), key=lambda sample: inputs.ids[sample])
    index = torch.tensor(order, device=inputs.x.device)
    counts = torch.tensor([inputs.ids.count(e) for e in range(len(inputs.scales))], device=inputs.x.device)
    ends = (counts * inputs.case.tokens).cumsum(0).to(torch.int32)
    scale = inputs.scale[inputs.adapter_ids.long()[index]].to(inputs.x.dtype)[:, None, None]
    in_order = order == sorted(order)

    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y = inputs.base(x)
        rows = x if in_order else x.index_select(0, index)  # [B, T, K], grouped by adapter
        low = product(rows.flatten(0, 1), lora_A.mT, offs=ends).view(*x.shape[:2], -1) * scale
        delta = product(low.flatten(0, 1), lora_B.mT, offs=ends).view_as(y)
        return y.add_(delta) if in_order else y.index_add_(0, index, delta)

    return partial(run, inputs, forward)


def merged_per_sample(inputs: LinearInputs) -> Call:
    """The weight of each adapter merged in the call, in the case's dtype, then one product per sample."""

    def forward(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        weights = []
        for e, scale in enumerate(inputs.scales):
            weights.append(torch.addmm(inputs.weight, lora_B[e], lora_A[e], alpha=scale))
        # [B, T, N], filled sample by sample.
        y = x.new_empty(*x.shape[:2], inputs.weight.shape[0])
        for sample, e in enumerate(inputs.ids):
            if inputs.bias is None:
                torch.mm(x[sample], weights[e].mT, out=y[sample])
            else:
                torch.addmm(inputs.bias, x[sample], weights[e].mT, out=y[sample])
        return y

    return partial(run, inputs, forward)


def unsloth_style(inputs: LinearInputs) -> Call:
    """One adapter with a hand-written gradient, every low-rank product added in place."""
    forward = lambda x, a, b: InPlaceLoRA.apply(x, inputs.weight, inputs.bias, a, b, inputs.scales[0])  # noqa: E731
    return partial(run, inputs, forward)


class InPlaceLoRA(torch.autograd.Function):
    """``x W^T + bias + s (x A^T) B^T`` of one adapter, x `[B, T, K]`, A `[1, R, K]`, B `[1, N, R]`; saves x, A and B."""

    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scale):
        a, b = lora_A[0], lora_B[0]
        rows = x.flatten(0, 1)
        y = F.linear(rows, weight, bias).addmm_(rows @ a.mT, b.mT, alpha=scale)
        ctx.save_for_backward(rows, a, b)
        ctx.weight, ctx.scale = weight, scale
        return y.view(*x.shape[:2], -1)

    @staticmethod
    def backward(ctx, upstream):
        rows, a, b = ctx.saved_tensors
        # Gradients of y = x W^T + s (x A^T) B^T: back = dy B [M, R] is shared by those of x and A.
        dy = upstream.flatten(0, 1)
        back = dy @ b
        dx = (dy @ ctx.weight).addmm_(back, a, alpha=ctx.scale)
        da = (back.mT @ rows).mul_(ctx.scale)
        db = (dy.mT @ (rows @ a.mT)).mul_(ctx.scale)
        return dx.view(*upstream.shape[:2], -1), None, None, da[None], db[None], None


def _peft_layer(inputs: LinearInputs) -> nn.Module:
    """PEFT's layer with the adapters "a0", "a1", ... and their scales, the first active."""
    holder = nn.Module()
    holder.linear = inputs.layer()
    factors = {"linear": (inputs.lora_A, inputs.lora_B)}
    peft_model(holder, ["linear"], factors, trains=inputs.lora_A.requires_grad)
    for e, scale in enumerate(inputs.scales):
        holder.linear.scaling[f"a{e}"] = scale
    return holder.linear


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
