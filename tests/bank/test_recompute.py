"""Gradient checkpointing: the same updates, to the bit, though every block is computed a second time."""

from __future__ import annotations

import pytest
import torch
from helpers.trainers import make_trainer, rolled, slots

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.errors import CloraError
from clora.testing import random_teachers

CRITIC_RATIO = 2


@pytest.fixture
def block_calls(adapter, monkeypatch):
    """Counts the runs of the transformer's first block, with gradients and without."""
    calls, block = {True: 0, False: 0}, type(adapter.pipeline.transformer.transformer_blocks[0])
    forward = block.forward

    def counting(self, *arguments, **keywords):
        calls[torch.is_grad_enabled()] += 1
        return forward(self, *arguments, **keywords)

    monkeypatch.setattr(block, "forward", counting)
    return calls


def test_a_run_is_the_same_with_and_without(adapter, block_calls):
    found = {}
    for checkpointing in (False, True):
        # Without a bound no pass is made to choose one.
        train = {"gradient_checkpointing": checkpointing, "critic_ratio": CRITIC_RATIO, "gradient_rows": None}
        reports = []
        with make_trainer(adapter, train=train) as trainer:
            trainer.fit(lambda update, values, reports=reports: reports.append(dict(values)))
            found[checkpointing] = (reports, slots(trainer), dict(block_calls))
    assert found[True][0] == found[False][0]
    for name, state in found[False][1].items():
        for module, lora in state.modules.items():
            again = found[True][1][name].modules[module]
            assert torch.equal(lora.lora_A, again.lora_A)
            assert torch.equal(lora.lora_B, again.lora_B)
    learning, others = found[False][2][True], found[False][2][False]
    # Of an update's student one pass for the rows that its critic needs, too, and one for the others; two blocks.
    assert learning == 2 * (2 + CRITIC_RATIO)
    assert found[True][2] == {True: 3 * learning, False: 2 * others}, "twice in every pass that learns, once in others"


def test_a_mixed_batch_is_computed_again_on_its_own_slots(adapter, inputs):
    x, sigma, conditioning = inputs(5)
    with AdapterBank(adapter.pipeline.transformer, random_teachers(adapter.pipeline.transformer, 3)) as bank:
        first, second = bank.slots(trainable=True), bank.slots(["effect_2"], trainable=True)
        passes = [(first, torch.tensor([2, -1, 0, 1, 1])), (second, torch.tensor([0, 0, -1, 0, -1]))]

        def gradients():
            """Two passes are open when the gradient of the first is asked for."""
            outputs = []
            for slots, ids in passes:
                with bank.route(slots, ids):
                    outputs.append(adapter.velocity(x, sigma, conditioning))
            sum(output.square().sum() for output in outputs).backward()
            return [parameter.grad for slots, _ in passes for parameter in slots.parameters()]

        expected = gradients()
        for slots, _ in passes:
            for parameter in slots.parameters():
                parameter.grad = None
        with recomputed_blocks(bank):
            found = gradients()
        assert bank.running is None
    assert any(gradient.any() for gradient in expected)
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, expected, strict=True))


def test_less_is_kept_for_the_gradient(adapter):
    sizes = {}
    for checkpointing in (False, True):
        with make_trainer(adapter) as trainer:
            rows = trainer.steps._student_rows(*rolled(trainer))
            kept = []

            def keep(tensor, kept=kept):
                kept.append(tensor.nbytes)
                return tensor

            context = recomputed_blocks(trainer.bank) if checkpointing else torch.enable_grad()
            with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                trainer.steps._velocity(trainer.student, 0, rows.x, rows.sigma, rows.conditioning)
            sizes[checkpointing] = sum(kept)
    assert sizes[True] < sizes[False] / 3


def test_the_transformer_is_left_as_it_was(adapter):
    transformer = adapter.pipeline.transformer
    with make_trainer(adapter, train={"gradient_checkpointing": True}) as trainer:
        trainer.data.targets[:] = torch.nan
        with pytest.raises(CloraError, match="not finite"):
            trainer.fit(lambda update, values: None)
    assert not transformer.is_gradient_checkpointing
    assert not transformer.training
