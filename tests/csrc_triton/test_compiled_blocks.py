"""Blocks and transformers of diffusers that carry a bank under torch.compile: one graph each, the results of eager passes."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from helpers.families import FAMILIES, inputs_of, tiny_transformer
from torch._dynamo.testing import CompileCounterWithBackend

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.testing import random_lora
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
RECOMPUTED = "QwenImageEditPlusPipeline"
COMPILED = [
    *(pytest.param(f, "aot_eager", marks=[] if f == RECOMPUTED else pytest.mark.slow) for f in FAMILIES),
    *([] if INTERPRETED else [(FAMILIES[0], "inductor")]),
]
FIRST, OTHER = ([1, -1], ["0", "1"]), ([-1, 0], ["1", "2"])
"""The ids of a pass and the slots that they count."""
ALLOWED = "skip_fwd_side_effects_in_bwd_under_checkpoint"
"""PyTorch's setting without which a recomputed part of a graph may not change anything outside it."""


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Passes:
    """Routed passes through a tiny transformer of a family and the gradients of the slots' factors."""

    def __init__(self, family):
        self.transformer = tiny_transformer(family).to(DEVICE)
        loras = {str(seed): random_lora(self.transformer, 2, seed) for seed in range(3)}
        self.bank = AdapterBank(self.transformer, loras)
        self.inputs = inputs_of(family, 2, DEVICE)
        self.blocks = [m for m in self.transformer.modules() if type(m).__name__ in self.transformer._repeated_blocks]

    def __call__(self, ids, names):
        slots = self.bank.slots(names, trainable=True)
        with self.bank.route(slots, torch.tensor(ids, device=DEVICE)):
            (output,) = self.transformer(**self.inputs, return_dict=False)
            assert not self.bank.running.waiting
        gradients = torch.autograd.grad(output.square().sum(), slots.parameters(), materialize_grads=True)
        assert any(gradient.any() for gradient in gradients)
        return [output.detach(), *gradients]


def assert_equal(found, expected, tolerance=0.0 if INTERPRETED else 1e-4):
    """To the bit where the same operators run on the CPU."""
    for result, truth in zip(found, expected, strict=True):
        assert (result - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize(("family", "compiler"), COMPILED)
def test_a_block_is_one_graph_for_all_ids_and_slots(family, compiler, monkeypatch):
    """`fullgraph` raises where a graph would break. The second pass also computes its compiled blocks again."""
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    passes, counter = Passes(family), CompileCounterWithBackend(compiler)
    expected = passes(*FIRST), passes(*OTHER)
    passes.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert_equal(passes(*FIRST), expected[0])
    with recomputed_blocks(passes.bank):
        assert_equal(passes(*OTHER), expected[1])
    assert counter.frame_count == len(passes.blocks)


@pytest.mark.parametrize("family", [pytest.param("Flux2KleinPipeline", marks=pytest.mark.slow), RECOMPUTED])
def test_a_transformer_on_eager_ops_is_one_graph_for_all_ids_and_slots(family, monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "eager")
    passes, counter = Passes(family), CompileCounterWithBackend("aot_eager")
    expected = passes(*FIRST), passes(*OTHER)
    passes.transformer.compile(fullgraph=True, backend=counter)
    # Outside of a graph the rows of a LoRA are merged or multiplied together, which rounds otherwise.
    with recomputed(passes.bank) if family == RECOMPUTED else nullcontext():
        assert_equal(passes(*FIRST), expected[0], tolerance=1e-5)
        assert_equal(passes(*OTHER), expected[1], tolerance=1e-5)
    assert counter.frame_count == 1


@contextmanager
def recomputed(bank):
    """`recomputed_blocks` within a graph."""
    if not hasattr(torch._dynamo.config, ALLOWED):
        pytest.skip(f"torch {torch.__version__} does not compile recomputed blocks that note waiting outputs")
    with torch._dynamo.config.patch(ALLOWED, True), recomputed_blocks(bank):
        yield
