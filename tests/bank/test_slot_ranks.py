"""Slots of 16 bits have multiples of 8 ranks, so that the kernels' hardware copies (TMA) can read them: nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clora.bank.bank import AdapterBank
from clora.lora.state import LoRAModule, LoRAState

WIDTH, TOKENS = 32, 6
NAMES = ("to_q", "to_k", "to_v")
RANKS = [{"to_q": 5, "to_k": 12, "to_v": 5}, {"to_q": 3, "to_k": 9, "to_v": 8}]


class Attention(nn.Module):
    """The projections of an attention, as a transformer of 16 bits."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        for name in NAMES:
            self.add_module(name, nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False))

    def forward(self, x):
        return torch.cat([self.get_submodule(name)(x) for name in NAMES], -1)


def loras(dtype):
    """Two LoRAs that share a stack, in the dtype of their slots."""
    generator = torch.Generator().manual_seed(1)

    def factor(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    made = {}
    for name, ranks in zip("ab", RANKS, strict=True):
        made[name] = LoRAState({m: LoRAModule(factor(r, WIDTH), factor(WIDTH, r)) for m, r in ranks.items()})
    return made


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, (8, 16, 8)), (torch.float32, (5, 12, 8))])
@pytest.mark.parametrize("pages", [None, 2])
def test_only_slots_of_16_bits_are_padded(dtype, expected, pages):
    given = loras(dtype)
    with AdapterBank(Attention(dtype), given, pages=pages) as bank, bank.placed(torch.tensor([0, 1])) as slots:
        (stack,) = slots.stacks
        for name, rank in zip(NAMES, expected, strict=True):
            a, b = stack.factors[name]
            assert (a.shape[1], b.shape[2]) == (rank, rank)
        for name, state in given.items():
            own = bank.state(name)
            for module, lora in state.modules.items():
                assert torch.equal(own.modules[module].lora_A, lora.lora_A)
                assert torch.equal(own.modules[module].lora_B, lora.lora_B)


@pytest.mark.parametrize("pages", [None, 2])
def test_a_padded_lora_is_the_lora(pages):
    layers, given = Attention(torch.float16), loras(torch.float16)
    x = torch.randn(3, TOKENS, WIDTH, dtype=torch.float16)
    with AdapterBank(layers, given, pages=pages) as bank, bank.placed(torch.tensor([0, 1])) as slots, torch.no_grad():
        with bank.route(slots, [1, -1, 0]):
            found = layers(x)
    for sample, name, y in zip(x, ("b", None, "a"), found, strict=True):
        expected = []
        for module in NAMES:
            layer = layers.get_submodule(module)
            weight = layer.weight.double()
            if name is not None:
                weight = weight + given[name].modules[module].delta().double()
            expected.append(sample.double() @ weight.T + layer.bias.double())
        torch.testing.assert_close(y.double(), torch.cat(expected, -1), rtol=2e-3, atol=2e-2)
