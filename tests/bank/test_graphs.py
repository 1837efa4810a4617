"""Passes by graphs: a stand-in for CUDA graphs records PyTorch's operators with their memory, and a GPU is asked where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from helpers.trainers import make_trainer, mixed_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clora import ops
from clora.bank import graphs
from clora.bank.graphs import graphed_blocks
from clora.errors import CloraError
from clora.testing import tiny_adapter, tiny_config, tiny_pipeline

EXACT = 1e-5
"""Relative; passes outside of graphs are computed by runs of rows, in another order."""


class Recording(TorchDispatchMode):
    """Captures as CUDA does: nothing is computed, and a replay does the same operators on the same memory."""

    def __init__(self):
        super().__init__()
        self.captured, self.replayed, self._steps = 0, 0, []

    def __call__(self, function):
        self.captured += 1
        self._steps = steps = []
        with self:
            function()

        def replay():
            self.replayed += 1
            for func, args, kwargs, outputs in steps:
                for kept, again in zip(outputs, tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(kept, torch.Tensor) and kept is not again:
                        kept.copy_(again)

        return replay

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [
            a for a, of in zip(args, func._schema.arguments, strict=False) if of.alias_info and of.alias_info.is_write
        ]
        before = [a.clone() for a in written if isinstance(a, torch.Tensor)]
        out = func(*args, **kwargs)
        for a, kept in zip([a for a in written if isinstance(a, torch.Tensor)], before, strict=True):
            a.copy_(kept)
        if not func.is_view:
            self._steps.append((func, args, kwargs, tree_leaves(out)))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and not written and tensor.is_floating_point():
                    tensor.fill_(torch.nan)
        return out


@pytest.fixture
def device_ops(monkeypatch):
    """The ops compute as on a GPU: by the ids on the device, which the host does not read."""
    monkeypatch.setenv("CLORA_BACKEND", "eager")
    monkeypatch.setattr(ops, "is_plain", lambda *layer: False)


class Passes:
    """Velocities of a trainer's batch, on the LoRAs of its bank."""

    def __init__(self, trainer):
        self.trainer, self.batch, self.slots = trainer, mixed_batch(trainer), trainer.bank.slots()

    def __call__(self, ids, slots=None, level=0.5):
        rows = torch.arange(len(ids)) % len(self.batch)
        x, conditioning = self.batch.target[rows], self.batch.student[rows]
        with self.trainer.bank.route(slots or self.slots, ids):
            return self.trainer.steps.adapter.velocity(x, x.new_full((len(ids),), level), conditioning)


@pytest.fixture
def passes(adapter, device_ops):
    with make_trainer(adapter) as trainer:
        yield Passes(trainer)


def assert_close(found, expected):
    assert (found - expected).norm() <= EXACT * expected.norm()


@torch.no_grad()
def test_replays_are_of_their_own_ids_and_inputs(passes):
    ids = [0, 1, 2, 3, -1], [3, 2, 1, 0, 0], [1, 1, 0, 3, 2], [-1, 0, 2, 1, 3], [2, 3, 3, 1, 0]
    cases = [*zip(ids, (0.5, 0.7, 0.2, 0.5, 0.9), strict=True)]
    expected = [passes(ids, level=level) for ids, level in cases]
    assert all(not torch.equal(a, b) for a, b in zip(expected, expected[1:], strict=False))
    backend = Recording()
    with graphed_blocks(passes.trainer.bank, backend):
        found = [passes(ids, level=level) for ids, level in cases]
    blocks = len(graphs.repeated_blocks(passes.trainer.bank.transformer))
    assert backend.captured == blocks
    assert backend.replayed == blocks * (len(cases) - 1)
    for velocity, other in zip(found, expected, strict=True):
        assert_close(velocity, other)


@torch.no_grad()
def test_other_sizes_and_other_stacks_have_graphs_of_their_own(passes):
    student = passes.trainer.student
    cases = [([0, 1], None), ([0, 0], student), ([0, 1, 2], None), ([0, 0], None), ([1, 2], None)]
    expected = [passes(*case) for case in cases]
    with graphed_blocks(passes.trainer.bank, Recording()):
        for _ in range(3):
            for case, other in zip(cases, expected, strict=True):
                assert_close(passes(*case), other)


@torch.no_grad()
def test_factors_that_an_optimizer_changed_are_read_anew(passes):
    student = passes.trainer.student
    with graphed_blocks(passes.trainer.bank, Recording()):
        before = [passes([0, 0], student) for _ in range(3)][-1]
        for factor in student.parameters():
            factor.mul_(2)
        after = passes([0, 0], student)
    assert not torch.equal(after, before)
    assert_close(after, passes([0, 0], student))


@torch.no_grad()
def test_outputs_of_a_block_are_the_callers_own(passes):
    outputs = []
    with graphed_blocks(passes.trainer.bank, Recording()):
        block = graphs.repeated_blocks(passes.trainer.bank.transformer)[0]
        hook = block.register_forward_hook(lambda module, inputs, output: outputs.append(tree_leaves(output)))
        for _ in range(2):
            passes([0, 1])
        kept = [y.clone() for y in outputs[-1]]
        passes([1, 0])
    hook.remove()
    assert all(torch.equal(y, own) for y, own in zip(outputs[1], kept, strict=True))
    assert not any(torch.equal(y, own) for y, own in zip(outputs[2], kept, strict=True))


@torch.no_grad()
def test_kernels_are_compiled_before_the_capture(passes):
    """They depend on strides and alignment: the pass before has those of the captured one, whatever the caller's are."""
    seen = []

    def forward(x):
        seen.append((x.stride(), x.data_ptr()))
        return x

    wide = torch.arange(48.0).view(2, 3, 8)
    bank = passes.trainer.bank
    run = graphs.GraphedBlocks(bank, Recording())
    with bank.route(passes.slots, [0, 1]):
        outputs = [run(bank.transformer, forward, x[..., :5]) for x in (wide, wide + 1, wide + 2)]
    assert len(seen) == 2
    assert seen[0] == seen[1]
    for i, y in enumerate(outputs):
        assert torch.equal(y, wide[..., :5] + i)


def test_training_takes_graphs_only_without_gradients(adapter, device_ops, monkeypatch):
    def losses(**train):
        reports = []
        with make_trainer(adapter, train={"updates": 3, **train}) as trainer:
            trainer.fit(lambda update, values: reports.append(dict(values)))
        return reports

    expected, backend = losses(), Recording()
    monkeypatch.setattr(graphs, "check_graphs", lambda transformer, paged: None)
    monkeypatch.setattr(graphs, "CudaCapture", lambda: backend)
    for values, other in zip(losses(cuda_graphs=True), expected, strict=True):
        assert values == pytest.approx(other, rel=1e-3, abs=1e-6)
    assert backend.replayed > backend.captured > 0


@torch.no_grad()
def test_kinds_of_inputs_are_bounded(passes, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_KINDS", 2)
    backend = Recording()
    expected = [passes([0] * count) for count in range(1, 6)]
    with graphed_blocks(passes.trainer.bank, backend):
        for _ in range(2):
            for count, other in zip(range(1, 6), expected, strict=True):
                assert_close(passes([0] * count), other)
    assert backend.captured == 2 * len(graphs.repeated_blocks(passes.trainer.bank.transformer))


def test_blocks_are_as_they_were_afterwards(passes):
    blocks = graphs.repeated_blocks(passes.trainer.bank.transformer)
    with graphed_blocks(passes.trainer.bank, Recording()):
        assert all("forward" in vars(block) for block in blocks)
    assert not any("forward" in vars(block) for block in blocks)


def test_without_a_gpu_it_is_refused(adapter):
    if adapter.pipeline.transformer.device.type == "cuda":
        pytest.skip("on a GPU")
    with make_trainer(adapter, train={"cuda_graphs": True}) as trainer:
        with pytest.raises(CloraError, match="expected an NVIDIA GPU, found cpu; switch it off"):
            trainer.fit(lambda *report: None)


@pytest.mark.parametrize("pages", [2, None])
def test_paged_and_offloaded_weights_are_refused(adapter, monkeypatch, pages):
    monkeypatch.setattr(type(adapter.pipeline.transformer), "device", torch.device("cuda"))
    with make_trainer(adapter, pages=pages) as trainer:
        if pages is None:
            monkeypatch.setattr(adapter.pipeline.transformer, "_hf_hook", object(), raising=False)
        refused = pytest.raises(CloraError, match="found some paged" if pages else "found hooks of accelerate")
        with refused, graphed_blocks(trainer.bank):
            pass


def test_both_ways_at_once_are_refused():
    with pytest.raises(ValueError, match="compile and cuda_graphs: expected at most one"):
        tiny_config(["a"], train={"compile": True, "cuda_graphs": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_cuda_graphs_on_a_gpu():
    adapter = tiny_adapter(tiny_pipeline().to("cuda"))
    cases = [([0, 1, 2], 0.5), ([0, 3, 1], 0.7), ([2, 2, 0], 0.2), ([0, -1, 1], 0.5)]
    with make_trainer(adapter) as trainer:
        passes = Passes(trainer)
        expected = [passes(ids, level=level) for ids, level in cases]
        with graphed_blocks(trainer.bank):
            for (ids, level), other in zip(cases, expected, strict=True):
                assert (passes(ids, level=level) - other).norm() <= 1e-3 * other.norm()
