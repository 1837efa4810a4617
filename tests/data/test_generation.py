"""Batched generation: a sample's result is its own, whatever batch it was computed in."""

from __future__ import annotations

import pytest
import torch

from clora.bank.bank import AdapterBank
from clora.data.generation import Generator
from clora.models.conditioning import Text
from clora.testing import merge_lora, random_teachers, tiny_adapter, tiny_pipeline

IDS = [1, -1, 0, 1, 2]
SEEDS = [3, 1, 4, 1, 5]


@pytest.fixture
def bank(adapter):
    with AdapterBank(adapter.pipeline.transformer, random_teachers(adapter.pipeline.transformer, 3)) as bank:
        yield bank


def run(sampler, generator, conditioning, ids, seeds):
    empty = Text(torch.randn(1, *conditioning.text.embeds.shape[1:], generator=torch.Generator().manual_seed(0)))
    if sampler == "few_step":
        return generator.few_step(torch.tensor(ids), conditioning, seeds, 3, 3.0)
    return generator.euler(torch.tensor(ids), conditioning, seeds, 3, empty, 1.5 if sampler == "guided_euler" else 0.0)


@pytest.mark.parametrize("sampler", ["guided_euler", "euler", "few_step"])
def test_the_result_does_not_depend_on_the_batch(adapter, bank, inputs, sampler):
    conditioning, passes, results = inputs(5)[2], [], []
    for batch_size in (5, 2):
        passes.append([])
        generator = Generator(adapter, bank, batch_size, passes[-1].append)
        results.append(run(sampler, generator, conditioning, IDS, SEEDS))
        assert sum(passes[-1]) == 5 * 3 * (2 if sampler == "guided_euler" else 1)
        assert max(passes[-1]) == batch_size * (2 if sampler == "guided_euler" else 1)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    order = [4, 2, 0, 3, 1]
    ids, seeds = [IDS[i] for i in order], [SEEDS[i] for i in order]
    permuted = run(sampler, generator, conditioning[torch.tensor(order)], ids, seeds)
    torch.testing.assert_close(permuted, results[0][order], rtol=1e-5, atol=1e-5)
    assert not results[0].requires_grad


def test_seeds_and_adapters_matter(adapter, bank, inputs):
    conditioning = inputs(1)[2][[0] * 4]
    generator = Generator(adapter, bank)
    out = run("few_step", generator, conditioning, [0, 0, 0, 1], [1, 1, 2, 1])
    torch.testing.assert_close(out[0], out[1], rtol=1e-5, atol=1e-5)
    assert (out[0] - out[2]).abs().max() > 0.1
    assert (out[0] - out[3]).abs().max() > 0.01


def test_a_slot_equals_a_plain_transformer_without_a_bank(adapter, bank, inputs):
    conditioning = inputs(2)[2]
    routed = run("few_step", Generator(adapter, bank), conditioning, [2, 2], [0, 1])
    state = bank.state("effect_2")
    pipeline = tiny_pipeline()
    pipeline.transformer = merge_lora(pipeline.transformer, state)
    plain = run("few_step", Generator(tiny_adapter(pipeline)), conditioning, [2, 2], [0, 1])
    torch.testing.assert_close(routed, plain, rtol=1e-4, atol=1e-4)
