"""`coarse_to_fine_loss` against a per-row loop with hand-derived gradients in fp64, and its surrogate form."""

import pytest
import torch
from helpers.loss_cases import CASES, GUIDANCE, LATENT, make

from clora.ops import Scores, coarse_to_fine_loss


def by_hand(c):
    """(terms, gradients of the row terms, gradient of the loss), one row at a time, derivatives written out."""
    values, gradients, d = [], [], len(c["scores"].sigma)
    v, scores = c["velocity"].detach(), c["scores"]
    for row, kind in enumerate(c["kind"].tolist()):
        numel = v[row].numel()
        if kind == 2:
            error = v[row] - c["anchor_target"][row - d]
            values.append((error**2).sum() / numel)
            gradients.append(2 * error / numel)
            continue
        level = scores.sigma[row]
        x_g = c["x"][row] - c["sigma"][row] * v[row]
        fake, cond, uncond = (scores.renoised[row] - level * s[row] for s in scores[2:])
        real = cond + c["guidance"] * (cond - uncond)
        g = (fake - real) / (x_g - real).abs().mean()
        values.append(0.5 * (g**2).mean())
        gradients.append(-c["sigma"][row] * g / numel)
    terms, total = [], [torch.zeros_like(g) for g in gradients]
    for k in range(3):
        rows = [row for row, kind in enumerate(c["kind"].tolist()) if kind == k]
        terms.append(sum((c["weight"][row] * values[row] for row in rows), torch.zeros(())) / max(len(rows), 1))
        for row in rows:
            total[row] = c["weight"][row] * gradients[row] / len(rows)
    return terms, gradients, total


@pytest.mark.parametrize("latent", [LATENT, (7,), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_loop_with_hand_derived_gradient(name, latent):
    c = make(CASES[name], latent)
    expected, row_gradients, gradient = by_hand(c)
    loss, terms = coarse_to_fine_loss(**c)
    close = {"rtol": 1e-11, "atol": 1e-14, "check_dtype": False}
    for term, value in zip(("dmd_bs", "dmd_ts", "anchor"), expected, strict=True):
        torch.testing.assert_close(terms[term], value, **close)
    torch.testing.assert_close(loss.detach(), sum(expected), **close)
    loss.backward()
    assert torch.equal(terms["velocity_gradient"], c["velocity"].grad)
    assert terms["gradient_norm"].shape == terms["nonfinite"].shape == c["kind"].shape
    assert not terms["nonfinite"].any()
    for row, (row_gradient, total) in enumerate(zip(row_gradients, gradient, strict=True)):
        torch.testing.assert_close(c["velocity"].grad[row], total, **close)
        torch.testing.assert_close(terms["gradient_norm"][row], row_gradient.norm(), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_gradient_comes_with_the_loss(dtype):
    c = make(CASES["all_kinds"], dtype=dtype)
    loss, terms = coarse_to_fine_loss(**c)
    assert terms["velocity_gradient"].dtype == (torch.float32 if dtype == torch.float16 else dtype)
    (expected,) = torch.autograd.grad(loss, c["velocity"])
    c["velocity"].backward(terms["velocity_gradient"])
    assert c["velocity"].grad.dtype == dtype
    assert torch.equal(c["velocity"].grad, expected)
    with torch.no_grad():
        untracked_loss, untracked = coarse_to_fine_loss(**c)
    assert not untracked_loss.requires_grad
    assert torch.equal(untracked_loss, loss)
    assert torch.equal(untracked["velocity_gradient"], terms["velocity_gradient"])


def test_loss_scaling_saves_small_fp16_gradients():
    """They are below the smallest fp16 number and stay fp32 until the scale has been applied."""
    c = make(CASES["all_kinds"], dtype=torch.float16)
    c["weight"] = c["weight"].float() * 1e-8
    (plain,) = torch.autograd.grad(coarse_to_fine_loss(**c)[0], c["velocity"])
    loss, terms = coarse_to_fine_loss(**c)
    (scaled,) = torch.autograd.grad(loss * 2.0**20, c["velocity"])
    assert not plain.any()
    assert scaled.dtype == torch.float16
    assert torch.equal(scaled, (terms["velocity_gradient"] * 2.0**20).half())


def test_the_gradient_has_no_gradient():
    c = make(CASES["all_kinds"])
    loss, terms = coarse_to_fine_loss(**c)
    assert not terms["velocity_gradient"].requires_grad
    (gradient,) = torch.autograd.grad(loss.square(), c["velocity"], create_graph=True)
    assert not gradient.requires_grad


def test_gradcheck_of_anchor_rows():
    """The other rows' gradient is by definition not the derivative of their value."""
    c = make(CASES["anchor_only"])
    velocity = c.pop("velocity")
    assert torch.autograd.gradcheck(lambda v: coarse_to_fine_loss(v, **c)[0], velocity)


def test_gradient_equals_the_surrogate_of_the_paper():
    c = make([0, 0, 0])
    loss, _ = coarse_to_fine_loss(**c)
    (gradient,) = torch.autograd.grad(loss, c["velocity"])
    rows = lambda t: t.view(-1, 1, 1, 1)  # noqa: E731
    scores = c["scores"]
    x_g = c["x"] - rows(c["sigma"]) * c["velocity"]
    fake, cond, uncond = (scores.renoised - rows(scores.sigma) * s for s in scores[2:])
    real = cond + GUIDANCE * (cond - uncond)
    g = (fake - real) / (x_g - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    surrogate = 0.5 * (x_g - (x_g - g).detach()).square().mean(dim=(1, 2, 3))
    expected = (surrogate * c["weight"]).mean()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, c["velocity"])[0], rtol=1e-10, atol=1e-16)


def test_gradient_reaches_velocity_only():
    c = make(CASES["all_kinds"])
    others = [c["x"], c["sigma"], c["weight"], c["anchor_target"], *c["scores"]]
    for tensor in others:
        tensor.requires_grad_()
    loss, terms = coarse_to_fine_loss(**c)
    loss.backward()
    assert c["velocity"].grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in others)
    assert not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize("absent", ["scores", "anchor_target"])
def test_none_means_no_rows(absent):
    c = make(CASES["anchor_only"] if absent == "scores" else CASES["bs_only"])
    expected, _ = coarse_to_fine_loss(**c)
    loss, terms = coarse_to_fine_loss(**{**c, absent: None})
    assert torch.equal(loss, expected)
    assert terms["dmd_bs" if absent == "scores" else "anchor"] == 0


def test_row_alone_equals_row_in_a_mixed_batch_and_order_does_not_matter():
    c = make(CASES["all_kinds"])
    loss, terms = coarse_to_fine_loss(**c)
    order = torch.tensor([3, 0, 4, 2, 1, 6, 5])
    d = len(c["scores"].sigma)
    pick = lambda rows: {  # noqa: E731
        **{k: c[k][rows] for k in ("velocity", "x", "sigma", "kind", "weight")},
        "scores": Scores(*(s[rows[rows < d]] for s in c["scores"])),
        "anchor_target": c["anchor_target"][rows[rows >= d] - d],
        "guidance": GUIDANCE,
    }
    permuted_loss, permuted = coarse_to_fine_loss(**pick(order))
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(permuted["gradient_norm"], terms["gradient_norm"][order], rtol=1e-12, atol=0)
    alone = [coarse_to_fine_loss(**pick(torch.tensor([row]))) for row in range(len(order))]
    total = sum(loss / (c["kind"] == c["kind"][row]).sum() for row, (loss, _) in enumerate(alone))
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    norms = torch.cat([terms["gradient_norm"] for _, terms in alone])
    torch.testing.assert_close(norms, terms["gradient_norm"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("source", "row"),
    [("velocity", 1), ("velocity", 5), ("x", 0), ("critic", 2), ("teacher", 3), ("teacher_uncond", 4), ("anchor", 6)],
)
def test_nonfinite_row_is_reported_and_stays_in_its_row(source, row, poison):
    c = make(CASES["all_kinds"])
    clean_loss, clean = coarse_to_fine_loss(**c)
    clean_loss.backward()
    expected, c["velocity"].grad = c["velocity"].grad, None
    targets = {"velocity": c["velocity"].detach(), "x": c["x"], "anchor": c["anchor_target"][row - 5 :]}
    tensor = targets[source] if source in targets else getattr(c["scores"], source)
    tensor[0 if source == "anchor" else row, 0, 0, 0] = poison
    loss, terms = coarse_to_fine_loss(**c)
    loss.backward()
    others = torch.arange(7) != row
    assert not torch.isfinite(loss)
    assert terms["nonfinite"].tolist() == (~others).tolist()
    assert torch.equal(c["velocity"].grad[others], expected[others])
    assert torch.equal(terms["gradient_norm"][others], clean["gradient_norm"][others])
    for kind, name in enumerate(("dmd_bs", "dmd_ts", "anchor")):
        assert torch.isfinite(terms[name]) == (kind != c["kind"][row])


def test_a_mean_too_large_for_fp32_is_reported():
    """Dividing by it, though the differences of predictions are finite, would make a loss and a gradient of zero."""
    c = make([0, 1], dtype=torch.float32)
    c["x"][1] = 3e38
    loss, terms = coarse_to_fine_loss(**c)
    assert not torch.isfinite(loss)
    assert terms["nonfinite"].tolist() == [False, True]
    assert not torch.isfinite(terms["velocity_gradient"][1]).any()


def test_latents_without_elements_are_reported():
    c = make(CASES["all_kinds"], (0, 3))
    loss, terms = coarse_to_fine_loss(**c)
    assert torch.isnan(loss)
    assert terms["nonfinite"].all()
    assert terms["velocity_gradient"].shape == (7, 0, 3)


def test_student_equal_to_its_teacher_stays_finite():
    c = make([0])
    zero = torch.zeros(1, *LATENT, dtype=torch.float64)
    c["scores"] = Scores(c["x"], c["sigma"], *(c["velocity"].detach() for _ in range(3)))
    loss, terms = coarse_to_fine_loss(**c)
    loss.backward()
    assert loss == 0
    assert not terms["nonfinite"].any()
    assert torch.equal(c["velocity"].grad, zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_computes_in_fp32_from_low_precision(dtype):
    c = make(CASES["all_kinds"], dtype=dtype)
    upcast = lambda t: t.detach().double() if t.is_floating_point() else t  # noqa: E731
    exact = {k: upcast(t) for k, t in c.items() if isinstance(t, torch.Tensor)}
    exact |= {"scores": Scores(*map(upcast, c["scores"])), "guidance": GUIDANCE}
    exact["velocity"].requires_grad_()
    expected, _ = coarse_to_fine_loss(**exact)
    expected.backward()
    loss, _ = coarse_to_fine_loss(**c)
    loss.backward()
    assert loss.dtype == torch.float32
    assert c["velocity"].grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    eps = max(torch.finfo(dtype).eps, 1e-5)  # the gradient itself is rounded to the velocity's dtype
    assert (c["velocity"].grad - exact["velocity"].grad).norm() < eps * exact["velocity"].grad.norm()


def test_gradient_keeps_its_precision_when_small_beside_the_latent():
    """g is 1e-6 of x_g here: the surrogate form x_g - (x_g - g) would keep one digit of it in fp32."""
    c = make([0, 1], dtype=torch.float32)
    zero = torch.zeros(2, *LATENT)
    c["scores"] = Scores(zero, c["scores"].sigma, 1e-6 * c["scores"].critic, zero, zero)
    loss, _ = coarse_to_fine_loss(**c)
    loss.backward()
    x_g = (c["x"] - c["sigma"].view(2, 1, 1, 1) * c["velocity"]).detach()
    g = -c["scores"].sigma.view(2, 1, 1, 1) * c["scores"].critic / x_g.abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = -(c["weight"] * c["sigma"]).view(2, 1, 1, 1) * g / x_g[0].numel()
    torch.testing.assert_close(c["velocity"].grad, expected, rtol=1e-5, atol=0)


def test_never_reads_a_value_on_the_host():
    c = make(CASES["all_kinds"])
    meta = {k: t.detach().to("meta") for k, t in c.items() if isinstance(t, torch.Tensor)}
    meta |= {"scores": Scores(*(s.to("meta") for s in c["scores"])), "guidance": GUIDANCE}
    meta["velocity"].requires_grad_()
    loss, terms = coarse_to_fine_loss(**meta)  # a meta tensor has no values: any host read raises
    loss.backward()
    assert loss.is_meta
    assert all(term.is_meta for term in terms.values())


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("velocity", torch.zeros(7), r"velocity: expected \[R, ...\]"),
        ("x", torch.zeros(7, 3, 4, 4), r"x: expected shape \[7, 3, 4, 5\] .* found \[7, 3, 4, 4\]"),
        ("sigma", torch.zeros(7, 1), r"sigma: expected shape \[7\]"),
        ("kind", torch.zeros(6), r"kind: expected shape \[7\]"),
        ("weight", torch.zeros(()), r"weight: expected shape \[7\]"),
        ("anchor_target", torch.zeros(1, *LATENT), r"anchor_target: expected shape \[2, 3, 4, 5\]"),
        ("scores", None, r"anchor_target: expected shape \[7, 3, 4, 5\] \(7 rows, 0 scored\)"),
    ],
)
def test_wrong_shape_is_named(name, wrong, message):
    c = {**make(CASES["all_kinds"]), name: wrong}
    with pytest.raises(ValueError, match=message):
        coarse_to_fine_loss(**c)


def test_wrong_score_shape_is_named():
    c = make(CASES["all_kinds"])
    c["scores"] = c["scores"]._replace(teacher=torch.zeros(4, *LATENT))
    with pytest.raises(ValueError, match=r"scores.teacher: expected shape \[5, 3, 4, 5\]"):
        coarse_to_fine_loss(**c)
