"""A bank's blocks under torch.compile: few graphs, the losses of eager training, and runs that go on without."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from helpers.trainers import make_trainer, mixed_batch
from torch._dynamo.testing import CompileCounterWithBackend

from clora.bank.compiled import compiled_blocks
from clora.errors import CloraError
from clora.training import trainer as training
from clora.training.resume import Checkpoints


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_other_sizes_and_routes_compile_nothing_after_the_second(adapter):
    counter = CompileCounterWithBackend("aot_eager")
    with make_trainer(adapter) as trainer, torch.no_grad():
        batch = mixed_batch(trainer)

        def velocity(ids):
            rows = torch.arange(len(ids)) % len(batch)
            with trainer.bank.route(trainer.bank.slots(), ids):
                adapter.velocity(batch.target[rows], torch.linspace(0.2, 0.9, len(ids)), batch.student[rows])

        routes = [0, 2, 3], [1, 0, 2, 2], [3, 0, 0, 1, 2], [2, 1, 0, 3, 3, -1, 0]
        with compiled_blocks(trainer.bank, counter):
            for ids in routes[:2]:
                velocity(ids)
            compiled = counter.frame_count
            for ids in routes[2:]:
                velocity(ids)
        assert counter.frame_count == compiled > 0


@pytest.mark.slow
def test_losses_are_those_of_an_eager_run_which_may_go_on_with_it(adapter, tmp_path):
    def run(updates, compiled, checkpoints=None):
        reports = []
        with make_trainer(adapter, train={"updates": updates, "schedule": "constant", "compile": compiled}) as trainer:
            trainer.fit(lambda update, values: reports.append(dict(values)), checkpoints)
        return reports

    expected = run(3, compiled=False)
    run(1, compiled=False, checkpoints=Checkpoints(tmp_path))
    blocks = training.compiled_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "compiled_blocks", lambda bank: blocks(bank, "aot_eager"))
        found = run(3, compiled=True, checkpoints=Checkpoints(tmp_path))
    for values, other in zip(found, expected[1:], strict=True):
        assert values == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_blocks_are_compiled_only_inside(adapter):
    counter = CompileCounterWithBackend("eager")
    transformer = adapter.pipeline.transformer
    with make_trainer(adapter) as trainer:
        with compiled_blocks(trainer.bank, counter):
            assert any(module._compiled_call_impl for module in transformer.modules())
        assert not any(module._compiled_call_impl for module in transformer.modules())


def test_a_transformer_without_repeated_blocks_is_refused(adapter, monkeypatch):
    with make_trainer(adapter) as trainer:
        monkeypatch.setattr(type(adapter.pipeline.transformer), "_repeated_blocks", [])
        with pytest.raises(CloraError, match="names no repeated blocks"), compiled_blocks(trainer.bank):
            pass
