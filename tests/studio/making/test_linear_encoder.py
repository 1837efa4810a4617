"""The analytic encoder computes principal components of patches, in a basis that keeps distances."""

import numpy as np
import pytest
import torch

from clora.studio.making import vae as studio_vae
from clora.studio.making.linear_encoder import latent_basis, principal_components, set_linear_encoder
from clora.studio.photographs import load_photographs


@pytest.fixture(scope="module")
def images():
    return studio_vae.training_images(np.random.default_rng(0), 48, 64, load_photographs())


@pytest.fixture(scope="module")
def vae(images):
    torch.manual_seed(0)
    model = studio_vae.make_vae().eval()
    set_linear_encoder(model, images)
    return model


@torch.no_grad()
def test_encoder_is_the_projection(vae, images):
    components, spread, mean = principal_components(images, 32)
    patches = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1)
    expected = (patches - mean) @ components.T @ latent_basis(spread).T
    found = vae.encode(images).latent_dist.mode().permute(0, 2, 3, 1)
    error = (found - expected).square().mean() / expected.square().mean()
    assert error < 1e-4


def test_basis_keeps_distances_and_levels_the_channels():
    spread = torch.linspace(3, 0.1, 32)
    basis = latent_basis(spread)
    rotation = basis / (spread / spread.square().mean().sqrt())
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), atol=1e-5, rtol=0)
    torch.testing.assert_close((basis @ basis.T).diag(), torch.ones(32), atol=1e-5, rtol=0)


@torch.no_grad()
def test_decoder_starts_from_whitened_components(vae, images):
    components, _, mean = principal_components(images, 32)
    latents = vae.encode(images).latent_dist.mode()
    whitened = vae.post_quant_conv(latents).permute(0, 2, 3, 1)
    patches = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1)
    expected = (patches - mean) @ components.T
    assert (whitened - expected).square().mean() < 1e-3
