"""Which LoRAs of a bank are merged: all in fp32 where it pays; in 16 bits only those that are strong and do not change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clora.bank import routing
from clora.bank.bank import AdapterBank
from clora.errors import CloraError
from clora.lora.state import LoRAModule, LoRAState

WIDTH, TOKENS, RANK = 32, 64, 4


class Layers(nn.Module):
    """Two layers, as a transformer."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False) for _ in range(2))

    def forward(self, x):
        return self.b(self.a(x))


def lora(layers, strength, seed):
    g = torch.Generator().manual_seed(seed)
    modules = {}
    for name, layer in layers.named_children():
        a, b = torch.randn(RANK, WIDTH, generator=g), torch.randn(WIDTH, RANK, generator=g)
        modules[name] = LoRAModule(a, b * (strength * layer.weight.float().norm() / (b @ a).norm()))
    return LoRAState(modules)


@pytest.fixture
def given(monkeypatch):
    """What the passes of a test hand to the op: the runs, and the strengths of the layer."""
    seen = []
    own = routing.multi_lora_linears

    def op(x, projections, scale, ids, *, runs, strengths, **options):
        seen.append((runs, strengths[0]))
        return own(x, projections, scale, ids, runs=runs, strengths=strengths, **options)

    monkeypatch.setattr(routing, "multi_lora_linears", op)
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strengths_are_those_of_the_loras(dtype, given):
    layers = Layers(dtype)
    loras = {"critic": lora(layers, 1.0, 0), "weak": lora(layers, 0.01, 1), "strong": lora(layers, 0.5, 2)}
    with AdapterBank(layers, loras, fixed=1) as bank, torch.no_grad(), bank.route(bank.slots(), [0, 2, 1, -1]):
        layers(torch.randn(4, TOKENS, WIDTH, dtype=dtype))
    (critic_runs, critic), (runs, teachers), *_ = given
    assert [run.adapter for run in critic_runs] == [0]
    assert [run.adapter for run in runs] == [1, 0, -1]
    assert critic is None
    if dtype == torch.bfloat16:
        assert teachers == pytest.approx((0.01, 0.5), rel=0.02)
    else:
        assert teachers is None  # fp32 bears any


def test_a_range_of_slots_has_its_own_strengths(given):
    layers = Layers(torch.bfloat16)
    loras = {"weak": lora(layers, 0.01, 1), "strong": lora(layers, 0.5, 2)}
    with AdapterBank(layers, loras) as bank, torch.no_grad(), bank.route(bank.slots(["strong"]), [0]):
        layers(torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16))
    assert given[0][1] == pytest.approx((0.5,), rel=0.02)


def test_a_paged_lora_takes_its_strength_to_its_page(given):
    layers = Layers(torch.bfloat16)
    loras = {str(strength): lora(layers, strength, i) for i, strength in enumerate((1.0, 0.01, 0.1, 0.5))}
    with AdapterBank(layers, loras, pages=2, fixed=1) as bank:
        for ids in ([1, 2], [3, 2, 0]):
            with bank.placed(torch.tensor(ids)) as slots, bank.route(slots, ids):
                layers(torch.randn(len(ids), TOKENS, WIDTH, dtype=torch.bfloat16))
            runs, strengths = given[0]
            found = [strengths[run.adapter] for run in runs]
            assert found == pytest.approx([float(list(loras)[i]) for i in ids if i], rel=0.02)
            given.clear()


def test_a_weight_is_measured_once_for_all_loras(monkeypatch):
    layers, measured, own = Layers(torch.bfloat16), [], torch.Tensor.norm
    monkeypatch.setattr(torch.Tensor, "norm", lambda tensor: measured.append(tensor.shape) or own(tensor))
    loras = {str(i): LoRAState({"a": LoRAModule(torch.ones(1, WIDTH), torch.ones(WIDTH, 1))}) for i in range(5)}
    for pages in (None, 2):
        with AdapterBank(layers, loras, pages=pages, fixed=1):
            assert measured == [(WIDTH, WIDTH)]
            measured.clear()


@pytest.mark.parametrize("pages", [None, 1])
def test_a_lora_that_was_measured_is_not_written_over(pages):
    """Its strength would be that of before, and could let a weak LoRA be merged in 16 bits."""
    layers = Layers(torch.bfloat16)
    weak, strong = lora(layers, 0.01, 1), lora(layers, 0.5, 2)
    with AdapterBank(layers, {"critic": strong, "strong": strong}, pages=pages, fixed=1) as bank:
        bank.write("critic", bank.trained("critic", weak))
        with pytest.raises(
            ValueError, match="expected one of the first fixed=1 LoRAs, which may change, found 'strong'"
        ):
            bank.write("strong", bank.trained("strong", weak))


@pytest.mark.parametrize(("strength", "known"), [(1.0, True), (2.0, True), (0.5, False)])
def test_a_weakened_pass_merges_nothing(strength, known, given):
    layers = Layers(torch.bfloat16)
    with AdapterBank(layers, {"strong": lora(layers, 0.5, 2)}) as bank, bank.route(bank.slots(), [0]):
        bank.running.strengthen(strength)
        layers(torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16))
    assert (given[0][1] is not None) == known


def test_parts_of_a_pass_are_one_output_with_and_without_gradient(given):
    layers = Layers(torch.float32)
    loras = {"critic": lora(layers, 1.0, 0), "weak": lora(layers, 0.01, 1), "strong": lora(layers, 0.5, 2)}
    x = torch.randn(5, TOKENS, WIDTH)
    outputs = []
    with AdapterBank(layers, loras, fixed=1) as bank:
        for grad in (True, False):
            with torch.set_grad_enabled(grad), bank.route(bank.slots(trainable=grad), [-1, 0, 2, 1, -1]):
                outputs.append(layers(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    expected = x
    for name, layer in layers.named_children():
        rows = []
        for sample, own in zip(expected, (None, "critic", "strong", "weak", None), strict=True):
            delta = loras[own].modules[name] if own else None
            weight = layer.weight if own is None else layer.weight + delta.lora_B @ delta.lora_A
            rows.append(sample @ weight.T + layer.bias)
        expected = torch.stack(rows)
    torch.testing.assert_close(outputs[1], expected, rtol=1e-4, atol=1e-4)


def test_a_pass_reads_the_choices_of_the_environment_once(monkeypatch):
    layers = Layers(torch.float32)
    monkeypatch.setenv("CLORA_BACKEND", "eager")
    x = torch.randn(1, TOKENS, WIDTH)
    with AdapterBank(layers, {"strong": lora(layers, 0.5, 2)}) as bank, torch.no_grad():
        with bank.route(bank.slots(), [0]):
            monkeypatch.setenv("CLORA_BACKEND", "trition")
            layers(x)
        with pytest.raises(CloraError, match="CLORA_BACKEND=trition"), bank.route(bank.slots(), [0]):
            layers(x)
