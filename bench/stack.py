"""A stack of transformer blocks with random weights, its result in fp64, and ways to run it with adapters.

Legend: B samples, T tokens, H hidden size, E adapters, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import StackCase, adapter_of
from bench.providers import BASE, OURS, Builder, Call, Outputs, peft_model
from clora.bank.bank import AdapterBank
from clora.lora.state import LoRAModule, LoRAState
from clora.ops import multi_lora_linear

LAYERS = ("to_q", "to_k", "to_v", "to_out", "up", "down")
Factors = dict[str, tuple[Tensor, Tensor]]
"""Per linear layer `lora_A [E, R, K]` and `lora_B [E, N, R]`."""


class Block(nn.Module):
    """Pre-norm attention and a GELU MLP of four times the width; no parameters but the six linear layers'."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in LAYERS[:4]:
            self.add_module(name, nn.Linear(hidden, hidden))
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:])
        # Each [B, heads, T, head size].
        layers = (self.to_q, self.to_k, self.to_v)
        q, k, v = (layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, x.shape[-1:])), approximate="tanh"))


def empty_stack(case: StackCase) -> nn.Sequential:
    """The case's blocks in a row, `[B, T, H]` to `[B, T, H]`, without values."""
    with torch.device("meta"):
        return nn.Sequential(*(Block(case.hidden, case.heads) for _ in range(case.blocks)))


@dataclass(frozen=True)
class StackInputs:
    """Hidden states `[B, T, H]`, the stack's parameters by name, the factors by layer, and the samples' adapters."""

    case: StackCase
    x: Tensor
    weights: dict[str, Tensor]
    factors: Factors
    ids: tuple[int, ...]

    def model(self) -> nn.Sequential:
        """A stack on these weights, frozen, nothing copied."""
        stack = empty_stack(self.case)
        stack.load_state_dict(self.weights, assign=True)
        return stack.eval().requires_grad_(False)

    def adapter_ids(self) -> Tensor:
        """`[B]` int32 on x's device."""
        return torch.tensor(self.ids, dtype=torch.int32, device=self.x.device)


def make_inputs(case: StackCase, device: torch.device, seed: int = 0) -> StackInputs:
    """Random weights and adapters; an adapter's delta is of half the size of its layer's output."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype).mul_(std)

    weights, factors = {}, {}
    for name, layer in empty_stack(case).named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        n, k = layer.weight.shape
        weights |= {f"{name}.weight": draw(n, k, std=k**-0.5), f"{name}.bias": draw(n, std=0.1)}
        lora_A = draw(case.adapters, case.rank, k, std=k**-0.5)
        factors[name] = lora_A, draw(case.adapters, n, case.rank, std=0.5 * case.rank**-0.5)
    return StackInputs(case, draw(case.samples, case.tokens, case.hidden), weights, factors, tuple(adapter_of(case)))


@torch.no_grad()
def expected(inputs: StackInputs) -> Outputs:
    """The result in fp64, sample by sample on merged weights."""
    # A stack per sample, into whose weights the sample's adapter is merged.
    rows = []
    for sample, e in enumerate(inputs.ids):
        stack = inputs.model().double()
        for name, (a, b) in inputs.factors.items():
            layer = stack.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight + b[e].double() @ a[e].double(), requires_grad=False)
        rows.append(stack(inputs.x[sample : sample + 1].double()))
    return {"y": torch.cat(rows)}


def eager(inputs: StackInputs) -> Outputs:
    """The result with clora's eager definition in every layer, in the dtype of the case."""
    model = inputs.model()
    ids = inputs.adapter_ids()
    scale = torch.ones(inputs.case.adapters, device=inputs.x.device)
    for name, factors in inputs.factors.items():
        # The layer is replaced within its block.
        parent, _, child = name.rpartition(".")
        block = model.get_submodule(parent)
        setattr(block, child, RoutedLinear(getattr(block, child), factors, scale, ids))
    return _run(model, inputs.x)


def providers(case: StackCase) -> dict[str, Builder]:
    """Name to builder of every way to run the pass."""
    return {
        BASE: lambda inputs: partial(_run, inputs.model(), inputs.x),
        "peft_mixed": peft_mixed,
        "peft_switch": peft_switch,
        OURS: ours,
    }


def peft_mixed(inputs: StackInputs) -> Call:
    """One pass of PEFT's model with an adapter name per sample."""
    model = peft_model(inputs.model(), LAYERS, inputs.factors).eval()
    return partial(_run, model, inputs.x, adapter_names=[f"a{e}" for e in inputs.ids])


def peft_switch(inputs: StackInputs) -> Call:
    """PEFT's model sample by sample, its adapter set before each."""
    model = peft_model(inputs.model(), LAYERS, inputs.factors).eval()

    @torch.no_grad()
    def call() -> Outputs:
        rows = []
        for sample, e in enumerate(inputs.ids):
            model.set_adapter(f"a{e}")
            rows.append(model(inputs.x[sample : sample + 1]))
        return {"y": torch.cat(rows)}

    return call


def ours(inputs: StackInputs) -> Call:
    """The trainer's own `AdapterBank` around the stack, its LoRAs frozen teachers; it computes q, k and v in one call."""
    loras = {}
    for e in range(inputs.case.adapters):
        modules = {name: LoRAModule(a[e], b[e]) for name, (a, b) in inputs.factors.items()}
        loras[f"a{e}"] = LoRAState(modules)
    model = inputs.model()
    bank = AdapterBank(model, loras)
    slots = bank.slots()
    ids = inputs.ids

    def call() -> Outputs:
        with bank.route(slots, ids):
            return _run(model, inputs.x)

    return call


class RoutedLinear(nn.Module):
    """A linear layer with the factors of the case, by clora's eager definition."""

    def __init__(self, base: nn.Linear, factors: tuple[Tensor, Tensor], scale: Tensor, ids: Tensor):
        super().__init__()
        self.base = base
        self.factors = factors
        self.scale = scale
        self.ids = ids

    def forward(self, x: Tensor) -> Tensor:
        layer = (self.base.weight, self.base.bias, *self.factors)
        return multi_lora_linear(x, *layer, self.scale, self.ids, backend="eager")


@torch.no_grad()
def _run(model: nn.Module, x: Tensor, **options) -> Outputs:
    return {"y": model(x, **options)}
