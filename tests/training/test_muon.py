"""The float32 Muon against torch's own, and the properties of its step."""

import math

import pytest
import torch

from clora.training.optimizers import COEFFICIENTS, Muon, orthogonalized


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_singular_values_are_brought_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ orthogonalized(matrix) @ vh.T  # the same singular vectors, so diagonal
    assert values.max() > 2 * values.min()
    assert rotated.diagonal().min() > 0.6
    assert rotated.diagonal().max() < 1.3
    assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare with")
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_steps_agree_with_torch_up_to_its_bfloat16(shape):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    gradients = torch.randn(3, *shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.01),
        torch.optim.Muon([theirs], lr=0.01, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    assert moved > 0


def test_matrices_of_a_stack_do_not_influence_one_another():
    stack = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(2))
    stack[1] *= 100
    torch.testing.assert_close(orthogonalized(stack), torch.stack([orthogonalized(m) for m in stack]))
    assert torch.equal(orthogonalized(stack * torch.tensor([1.0, 0.0])[:, None, None])[1], torch.zeros(8, 20))


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-6])
def test_iterations_on_the_gram_matrix_are_those_on_the_matrix(shape, smallest):
    """Against the iterations as they are defined, in fp64; also where most singular values are far below the first."""
    generator = torch.Generator().manual_seed(3)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = u @ torch.logspace(0, math.log10(smallest), 8).diag() @ vh
    a, b, c = COEFFICIENTS
    expected = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = expected @ expected.mT
        expected = (a * torch.eye(len(gram)) + b * gram + c * gram @ gram) @ expected
    assert (orthogonalized(matrix) - expected).norm() < 1e-3 * expected.norm()
