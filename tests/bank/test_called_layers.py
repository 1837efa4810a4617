"""Layers that compute more than their weight (quantised, cast or offloaded) are called, and their LoRAs added."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.families import FAMILIES, run, tiny_transformer
from torch import nn

from clora.bank import routing
from clora.bank.bank import AdapterBank
from clora.testing import merge_lora, random_lora

KLEIN = FAMILIES[0]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Stored(nn.Linear):
    """As a quantised layer: the weight that it has is not the one that it multiplies with."""

    def forward(self, x):
        return F.linear(x, -self.weight, self.bias)


class Wrapped(torch.Tensor):
    """As a quantised tensor: a subclass that knows how to multiply itself."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return F.linear(x, -weight.as_subclass(torch.Tensor), bias)
        return super().__torch_function__(function, types, args, kwargs or {})


def subclass(layer):
    layer.__class__ = Stored


def wrap(layer):
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Wrapped), requires_grad=False)


def hook(layer):
    layer.register_forward_hook(lambda module, args, y: (module.bias or 0) + -y)


@pytest.mark.parametrize("change", [subclass, wrap, hook])
def test_output_and_gradients_are_those_of_the_layer_itself(change):
    """q of q, k and v is another layer; the two others are still computed together."""
    transformer = tiny_transformer(KLEIN)
    path = "transformer_blocks.0.attn.to_q"
    state = random_lora(transformer, 3, 1)
    negative = copy.deepcopy(transformer)
    negative.get_submodule(path).weight.data.neg_()
    merged = merge_lora(negative, state)
    change(transformer.get_submodule(path))
    bank = AdapterBank(transformer, {"a": state, "b": random_lora(transformer, 2, 2)})
    with bank.route(bank.slots(), torch.tensor([0])):
        torch.testing.assert_close(run(KLEIN, transformer), run(KLEIN, merged), **TOLERANCE)

    slots = bank.slots(["a"], trainable=True)
    a, b = slots.stacks[0].factors[path]
    layer, plain = transformer.get_submodule(path), merged.get_submodule(path)
    x = torch.randn(1, 4, layer.base.in_features, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with bank.route(slots, torch.tensor([0])):
        found = torch.autograd.grad(layer(x).square().sum(), [x, a, b])
    factors = [factor[0].detach().requires_grad_() for factor in (a, b)]
    weight = negative.get_submodule(path).weight + factors[1] @ factors[0]
    expected = torch.autograd.grad(F.linear(x, weight, plain.bias).square().sum(), [x, *factors])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-4, atol=1e-4)
    bank.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_layerwise_casting(family, monkeypatch):
    """Weights in fp8 between calls, arithmetic in fp32."""
    transformer = tiny_transformer(family)
    states = {name: random_lora(transformer, rank, rank) for name, rank in (("a", 2), ("b", 4))}
    rounded = copy.deepcopy(transformer)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, parameter in transformer.named_parameters():
        rounded.get_parameter(name).data.copy_(parameter.float())
    added = []
    add = routing.multi_lora_add
    monkeypatch.setattr(
        routing, "multi_lora_add", lambda y, *rest, **options: added.append(y.dtype) or add(y, *rest, **options)
    )
    bank = AdapterBank(transformer, states)
    assert bank.dtype == torch.float32
    with bank.route(bank.slots(), torch.tensor([1])):
        found = run(family, transformer)
    assert added
    torch.testing.assert_close(found, run(family, merge_lora(rounded, states["b"])), **TOLERANCE)
    bank.detach()
    assert torch.equal(run(family, transformer), run(family, rounded))


def test_offloaded_weights():
    """accelerate's hooks bring a layer's weight for its call only; between calls it has none."""
    accelerate = pytest.importorskip("accelerate")
    transformer = tiny_transformer(KLEIN)
    state = random_lora(transformer, 3, 1)
    expected = run(KLEIN, merge_lora(transformer, state))
    accelerate.cpu_offload(transformer, execution_device=torch.device("cpu"))
    assert transformer.get_submodule("transformer_blocks.0.attn.to_q").weight.is_meta
    bank = AdapterBank(transformer, {"a": state})
    with bank.route(bank.slots(), torch.tensor([0])):
        torch.testing.assert_close(run(KLEIN, transformer), expected, **TOLERANCE)
    bank.detach()
