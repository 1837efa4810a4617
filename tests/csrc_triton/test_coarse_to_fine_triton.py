"""The kernels of the coarse-to-fine loss, on a GPU or in Triton's interpreter, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from helpers.loss_cases import CASES, LATENT
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from helpers.loss_kernel_cases import DEVICE, DTYPES, EPS, case, run, upcast

from clora.ops import Scores
from csrc_triton.coarse_to_fine import launch, reference
from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton

LATENTS = [LATENT, (1,), (5000,), (2, 1, 3, 7)]  # 5000: three chunks in a row of four partials
PER_ROW = ("velocity", "x", "sigma", "kind", "weight")

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of the NaN and infinities tested here
]


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
    """Growth of the inputs' relative error in these differences."""
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
    sizes=st.sampled_from([(16, 3, 2), (64, 128, 16), (2048, 1, 2)]),  # each is compiled
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
