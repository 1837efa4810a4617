"""The kernels of the coarse-to-fine loss, on a GPU or in Triton's interpreter, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.loss_cases import CASES, GUIDANCE, LATENT, make
from hypothesis import given, settings
from hypothesis import strategies as st

from clora.ops import Scores, coarse_to_fine_loss
from csrc_triton.coarse_to_fine import reference

pytest.importorskip("triton")

from csrc_triton.coarse_to_fine import launch
from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton, loss_op
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LATENTS = [LATENT, (1,), (5000,), (2, 1, 3, 7)]  # 5000: three chunks in a row of four partials
PER_ROW = ("velocity", "x", "sigma", "kind", "weight")
EPS = torch.finfo(torch.float32).eps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the NaN and infinities tested here


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Outputs and workspaces begin as NaN (True where boolean): what a kernel leaves out shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", poisoned)


def case(kinds, latent=LATENT, dtype=torch.float32, seed=0):
    """Inputs on the device; in the interpreter velocity is never bf16, which it truncates where a GPU rounds."""
    c = make(kinds, latent, dtype, seed)
    velocity = c["velocity"].detach()
    if INTERPRETED and dtype == torch.bfloat16:
        velocity = velocity.float()
    moved = {name: t.to(DEVICE) for name, t in c.items() if isinstance(t, torch.Tensor)}
    scores = Scores(*(t.to(DEVICE) for t in c["scores"]))
    return c | moved | {"velocity": velocity.to(DEVICE).requires_grad_(), "scores": scores}


def run(loss_function, c, upstream=1.0):
    """Loss, terms and gradient as one mapping."""
    velocity = c["velocity"].detach().clone().requires_grad_()
    loss, terms = loss_function(**{**c, "velocity": velocity})
    (gradient,) = torch.autograd.grad(loss * upstream, velocity)
    return terms | {"loss": loss.detach(), "gradient": gradient}


def upcast(c):
    double = lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    return {name: double(value) for name, value in c.items()} | {"scores": Scores(*map(double, c["scores"]))}


def differences(c):
    """The differences that the loss is made of, each as the list of its parts `[rows, numel]`."""
    scores, d, w = c["scores"], len(c["scores"].sigma), c["guidance"]
    flat = lambda t: t.detach().flatten(1)  # noqa: E731
    velocity, sigma, level = flat(c["velocity"]), c["sigma"][:, None], scores.sigma[:, None]
    guided = [(1 + w) * flat(scores.teacher), -w * flat(scores.teacher_uncond)]
    x_g = [flat(c["x"])[:d], -sigma[:d] * velocity[:d]]
    yield [*x_g, -flat(scores.renoised), *(level * part for part in guided)]  # x_g - x0_real
    yield [*guided, -flat(scores.critic)]  # x0_fake - x0_real, over sigma
    yield [velocity[d:], -flat(c["anchor_target"])]


def condition(c):
    """How much the relative error of the inputs grows in these differences."""
    ratios = [sum(p.abs() for p in parts).mean(1) / sum(parts).abs().mean(1) for parts in differences(upcast(c))]
    return max([1.0, *torch.cat(ratios).tolist()])


def assert_within_budget(c, upstream=1.0):
    """Error of the kernels at most twice the eager one's in the same dtype, but for a few roundings of the input."""
    exact, eager = (run(reference.coarse_to_fine_loss, inputs, upstream) for inputs in (upcast(c), c))
    kernels = run(coarse_to_fine_loss_triton, c, upstream)
    assert kernels.keys() == exact.keys()
    floor = 2 * EPS * condition(c)
    for name, value in exact.items():
        if name == "nonfinite":
            assert torch.equal(kernels[name], value)
        elif value.numel():
            assert kernels[name].dtype == eager[name].dtype
            error, allowed = ((out[name] - value).abs().max() for out in (kernels, eager))
            assert error <= 2 * allowed + floor * value.abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("latent", LATENTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_eagers(name, latent, dtype):
    assert_within_budget(case(CASES[name], latent, dtype), upstream=3.0)


@pytest.mark.parametrize("latent", [(200,), (16, 4), (65,), (3,)], ids=str)
def test_many_tiles_chunks_and_blocks_of_rows(monkeypatch, latent):
    """Small tiles, so that a chunk loops, the last one is partly or wholly empty, and rows take four blocks."""
    for name, size in (("TILE", 16), ("MAX_CHUNKS", 4), ("ROWS", 2)):
        monkeypatch.setattr(launch, name, size)
    assert_within_budget(case(CASES["all_kinds"], latent))


def test_the_chunks_cover_a_row_once():
    for numel in (1, 2047, 2048, 2049, 262_144, 262_145, 16 * 128 * 128, 5_000_000, 2**31):
        count, tiles = launch.chunks_of(numel)
        assert count <= launch.MAX_CHUNKS
        assert (count - 1) * tiles * launch.TILE < numel <= count * tiles * launch.TILE


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    counts=st.tuples(*[st.integers(0, 3)] * 3).filter(any),
    latent=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    sizes=st.tuples(st.sampled_from([4, 16, 2048]), st.sampled_from([1, 3, 128]), st.sampled_from([2, 16])),
    guidance=st.floats(0, 8),
    seed=st.integers(0, 1000),
)
def test_any_shape(counts, latent, sizes, guidance, seed):
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    c = case(kinds, latent, seed=seed) | {"guidance": guidance}
    with pytest.MonkeyPatch.context() as patch:
        for name, size in zip(("TILE", "MAX_CHUNKS", "ROWS"), sizes, strict=True):
            patch.setattr(launch, name, size)
        assert_within_budget(c)


@pytest.mark.parametrize("absent", ["scores", "anchor_target"])
def test_none_means_no_rows(absent):
    c = case(CASES["anchor_only"] if absent == "scores" else CASES["bs_only"])
    expected, out = (run(coarse_to_fine_loss_triton, {**c, **given}) for given in ({}, {absent: None}))
    assert all(torch.equal(out[name], expected[name]) for name in expected)
    for name in ("dmd_bs", "dmd_ts") if absent == "scores" else ("dmd_ts", "anchor"):
        assert out[name] == 0


class Recorder:
    """Stands in for `wrap_triton` and keeps what each launch was given."""

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


def rows_of(c, rows):
    d = len(c["scores"].sigma)
    picked = {name: c[name].detach()[rows] for name in PER_ROW}
    scores = Scores(*(t[rows[rows < d]] for t in c["scores"]))
    return c | picked | {"scores": scores, "anchor_target": c["anchor_target"][rows[rows >= d] - d]}


def test_a_row_is_the_same_to_the_bit_in_any_batch_and_order():
    c = case(CASES["all_kinds"], (70, 30))
    together = run(coarse_to_fine_loss_triton, c)
    order = torch.tensor([3, 0, 4, 2, 1, 6, 5], device=DEVICE)
    permuted = run(coarse_to_fine_loss_triton, rows_of(c, order))
    torch.testing.assert_close(permuted["loss"], together["loss"], rtol=4 * EPS, atol=0)
    for name in ("gradient", "gradient_norm", "nonfinite"):
        assert torch.equal(permuted[name], together[name][order])
    for row in range(len(order)):
        alone = run(coarse_to_fine_loss_triton, rows_of(c, torch.tensor([row], device=DEVICE)))
        assert torch.equal(alone["gradient_norm"], together["gradient_norm"][row : row + 1])
    for row in (0, 2):  # the only row of its kind, so that its mean does not divide by more
        mixed = run(coarse_to_fine_loss_triton, rows_of(c, torch.tensor([row, 1, 5], device=DEVICE)))
        alone = run(coarse_to_fine_loss_triton, rows_of(c, torch.tensor([row], device=DEVICE)))
        assert torch.equal(alone["gradient"], mixed["gradient"][:1])


def test_runs_are_equal_to_the_bit():
    c = case(CASES["all_kinds"], (70, 30))
    first, second = (run(coarse_to_fine_loss_triton, c) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("source", "row"),
    [
        *[("velocity", 1), ("velocity", 5), ("x", 0), ("sigma", 3), ("weight", 4), ("weight", 6)],
        *[("renoised", 0), ("score_sigma", 1), ("critic", 2), ("teacher", 3), ("teacher_uncond", 4), ("anchor", 6)],
    ],
)
def test_a_nonfinite_input_is_reported_and_stays_in_its_row(source, row, poison):
    c = case(CASES["all_kinds"])
    clean = run(coarse_to_fine_loss_triton, c)
    scores = dict(zip(("renoised", "score_sigma", "critic", "teacher", "teacher_uncond"), c["scores"], strict=True))
    tensors = {name: c[name].detach() for name in PER_ROW} | scores | {"anchor": c["anchor_target"][row - 5 :]}
    tensor = tensors[source]
    tensor[(0 if source == "anchor" else row, *[-1] * (tensor.ndim - 1))] = poison
    out = run(coarse_to_fine_loss_triton, c)
    others = torch.arange(7, device=DEVICE) != row
    assert not torch.isfinite(out["loss"])
    assert torch.equal(out["nonfinite"], ~others)
    assert not torch.isfinite(out["gradient"][row]).all()
    for name in ("gradient", "velocity_gradient", "gradient_norm"):
        assert torch.equal(out[name][others], clean[name][others])
    for kind, name in enumerate(("dmd_bs", "dmd_ts", "anchor")):
        assert torch.isfinite(out[name]) == (kind != c["kind"][row])


def test_a_value_too_large_for_fp32_sums_is_reported():
    c = case([0, 1])
    c["x"][1] = 3e38
    out = run(coarse_to_fine_loss_triton, c)
    assert out["nonfinite"].tolist() == [False, True]


def test_latents_without_elements_are_reported():
    out = run(coarse_to_fine_loss_triton, case(CASES["all_kinds"], (0, 3)))
    assert torch.isnan(out["loss"])
    assert out["nonfinite"].all()
    assert out["gradient"].shape == out["velocity_gradient"].shape == (7, 0, 3)


def test_student_equal_to_its_teacher_stays_finite():
    c = case([0])
    c["scores"] = Scores(c["x"], c["sigma"], *(c["velocity"].detach() for _ in range(3)))
    out = run(coarse_to_fine_loss_triton, c)
    assert out["loss"] == 0
    assert not out["nonfinite"].any()
    assert not out["gradient"].any()


def test_gradient_keeps_its_precision_when_small_beside_the_latent():
    c = case([0, 1])
    zero = torch.zeros_like(c["x"])
    c["scores"] = c["scores"]._replace(
        renoised=zero, critic=1e-6 * c["scores"].critic, teacher=zero, teacher_uncond=zero
    )
    exact, out = run(reference.coarse_to_fine_loss, upcast(c)), run(coarse_to_fine_loss_triton, c)
    torch.testing.assert_close(out["gradient"].double(), exact["gradient"], rtol=1e-5, atol=0)


def test_loss_scaling_saves_small_fp16_gradients():
    """The gradient is fp32 until the upstream gradient has been applied, and then rounded once."""
    c = case(CASES["all_kinds"], dtype=torch.float16)
    c["weight"] = c["weight"].float() * 1e-8
    exact, out = run(reference.coarse_to_fine_loss, upcast(c), 2**20), run(coarse_to_fine_loss_triton, c, 2.0**20)
    assert out["gradient"].dtype == torch.float16
    assert (out["gradient"] - exact["gradient"]).norm() < 1e-3 * exact["gradient"].norm()


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
