"""The tiny pipeline that most tests of the engine run on."""

from __future__ import annotations

import pytest
import torch

from clora.models.conditioning import Conditioning, Text


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny pipeline, loadable by ``from_pretrained``."""
    from clora.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter():
    """The adapter of one shared tiny pipeline; a test that attaches a bank detaches it again."""
    from clora.testing import tiny_adapter

    return tiny_adapter()


@pytest.fixture
def inputs(adapter):
    """Returns inputs(n, seed): noisy latents, noise levels and conditioning of n different samples."""

    def make(n=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        conditioning = Conditioning(Text(draw(n, adapter.max_sequence_length, 24)), draw(n, *adapter.latent_shape))
        return draw(n, *adapter.latent_shape), torch.rand(n, generator=generator) * 0.8 + 0.1, conditioning

    return make
