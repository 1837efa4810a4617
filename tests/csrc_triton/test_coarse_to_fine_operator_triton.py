"""The coarse-to-fine loss as a PyTorch operator: its launches, inputs read in place, compilation and refusals."""

from __future__ import annotations

import pytest
import torch
from helpers.loss_cases import CASES, GUIDANCE

pytest.importorskip("triton")

from helpers.loss_kernel_cases import DEVICE, DTYPES, case, run

from clora.ops import Scores, coarse_to_fine_loss
from csrc_triton.coarse_to_fine import launch
from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton, loss_op
from csrc_triton.registration import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_empty")


class Recorder:
    """Stands in for `wrap_triton` and keeps the arguments of each launch."""

    def __init__(self, monkeypatch):
        self.launches, self._wrap = [], launch.wrap_triton
        monkeypatch.setattr(launch, "wrap_triton", self.record)

    def record(self, kernel):
        recorder, wrapped = self, self._wrap(kernel)

        class Launcher:
            def __getitem__(self, grid):
                def call(*args, **kwargs):
                    recorder.launches.append(args)
                    return wrapped[grid](*args, **kwargs)

                return call

        return Launcher()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_launches_for_loss_and_gradient(monkeypatch, dtype):
    """As a training step calls the op: velocity is the output of something that trains."""
    c = case(CASES["all_kinds"], dtype=dtype)
    launches = Recorder(monkeypatch).launches
    weight = torch.ones_like(c["velocity"], requires_grad=True)
    velocity = c["velocity"].detach() * weight
    loss, terms = coarse_to_fine_loss(**{**c, "velocity": velocity}, backend="triton")
    (by_loss,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    velocity.backward(terms["velocity_gradient"])
    assert len(launches) == 2
    assert torch.equal(weight.grad, c["velocity"].detach() * by_loss)


def test_two_launches_without_a_copy(monkeypatch):
    """Rows that are slices of a wider tensor, as the transformer's outputs are, are read where they lie."""
    c = case(CASES["all_kinds"], (6, 5))
    expected = run(coarse_to_fine_loss_triton, c)
    wide = lambda t: torch.cat([t.detach(), torch.full_like(t, torch.nan)], dim=1)[:, : t.shape[1]]  # noqa: E731
    strided = {name: wide(c[name]) for name in ("velocity", "x", "anchor_target")}
    strided["velocity"].requires_grad_()
    scores = Scores(*(wide(t) if t.ndim > 1 else t for t in c["scores"]))
    launches = Recorder(monkeypatch).launches
    loss, terms = coarse_to_fine_loss_triton(**{**c, **strided, "scores": scores})
    (gradient,) = torch.autograd.grad(loss, strided["velocity"])
    assert len(launches) == 2
    given = {t.data_ptr() for t in (*strided.values(), *scores)}
    assert given <= {t.data_ptr() for t in launches[0] if isinstance(t, torch.Tensor)}
    assert torch.equal(loss, expected["loss"])
    assert torch.equal(gradient, expected["gradient"])
    assert torch.equal(terms["velocity_gradient"], expected["gradient"])


def test_any_strides():
    c = case(CASES["all_kinds"], (6, 5))
    expected = run(coarse_to_fine_loss_triton, c)
    turned = lambda t: t.detach().mT.contiguous().mT if t.ndim > 1 else t.detach().repeat_interleave(2)[::2]  # noqa: E731
    strided = {name: turned(t) for name, t in c.items() if isinstance(t, torch.Tensor)}
    assert not any(t.is_contiguous() for t in strided.values())
    out = run(coarse_to_fine_loss_triton, {**c, **strided, "scores": Scores(*map(turned, c["scores"]))})
    assert all(torch.equal(out[name], expected[name]) for name in expected)


def test_rows_further_apart_than_int32_reaches():
    c = case([0, 0], (5,), torch.float16)
    distance = 2**31 + 16
    try:  # 4 GiB of addresses; in main memory only the pages that are written to exist
        storage = torch.zeros(1, dtype=torch.float16, device=DEVICE).untyped_storage()
        storage.resize_(2 * (distance + 5))
    except (RuntimeError, torch.OutOfMemoryError) as error:
        pytest.skip(f"no room for two rows 4 GiB apart: {error}")
    x = torch.tensor([], dtype=torch.float16, device=DEVICE).set_(storage, 0, (2, 5), (distance, 1))
    x.copy_(c["x"])
    expected, out = (run(coarse_to_fine_loss_triton, {**c, **given}) for given in ({}, {"x": x}))
    assert all(torch.equal(out[name], expected[name]) for name in expected)


def test_gradient_reaches_velocity_only():
    c = case(CASES["all_kinds"])
    others = [c["x"], c["sigma"], c["weight"], c["anchor_target"], *c["scores"]]
    for tensor in others:
        tensor.requires_grad_()
    loss, terms = coarse_to_fine_loss_triton(**c)
    assert not any(term.requires_grad for term in terms.values())
    loss.backward()
    assert c["velocity"].grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in others)


def test_the_gradient_has_no_gradient():
    c = case([2])
    loss, _ = coarse_to_fine_loss_triton(**c)
    (gradient,) = torch.autograd.grad(loss.square(), c["velocity"], create_graph=True)
    assert not gradient.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["all_kinds", "anchor_only"])
def test_opcheck(name, dtype):
    c = case(CASES[name], dtype=dtype)
    others = [c[key] for key in ("x", "sigma", "kind", "weight")]
    torch.library.opcheck(loss_op, (c["velocity"], *others, *c["scores"], c["anchor_target"], GUIDANCE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_watched_operator_equals_the_direct_path(dtype):
    """The path that torch.compile takes, without it."""
    c, names = case(CASES["all_kinds"], dtype=dtype), []
    expected = run(coarse_to_fine_loss_triton, c, 3.0)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        found = run(coarse_to_fine_loss_triton, c, 3.0)
    assert "clora::coarse_to_fine_loss" in names
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    c = case(CASES["all_kinds"])

    def doubled(velocity):
        loss, terms = coarse_to_fine_loss(**{**c, "velocity": velocity}, backend="triton")
        return 2 * loss, terms

    eager, compiled = (
        run(lambda function=function, **given: function(given["velocity"]), c)
        for function in (doubled, torch.compile(doubled, fullgraph=True, backend="aot_eager", dynamic=dynamic))
    )
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_never_waits_for_the_gpu():
    c = case(CASES["all_kinds"])
    run(coarse_to_fine_loss_triton, c)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(coarse_to_fine_loss_triton, c)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_fp64_is_refused():
    c = {name: t.double() if name == "x" else t for name, t in case([2]).items()}
    with pytest.raises(ValueError, match="do not cover this call: velocity or x is fp64"):
        coarse_to_fine_loss_triton(**c)


@pytest.mark.parametrize("name", ["sigma", "kind", "scores", "anchor_target"])
def test_a_tensor_elsewhere_is_named(name):
    c = case(CASES["all_kinds"])
    away = c["scores"]._replace(critic=c["scores"].critic.to("meta")) if name == "scores" else c[name].to("meta")
    with pytest.raises(ValueError, match=f"{'scores.critic' if name == 'scores' else name} is on meta, velocity on"):
        coarse_to_fine_loss_triton(**{**c, name: away})


def test_a_wrong_shape_is_named():
    c = case(CASES["all_kinds"])
    with pytest.raises(ValueError, match=r"scores.teacher: expected shape \[5, 3, 4, 5\]"):
        coarse_to_fine_loss_triton(**{**c, "scores": c["scores"]._replace(teacher=c["x"])})
