"""Every training loop with models and data on a device and the draws on the CPU, as on a GPU.

The device is ``meta``: its tensors have no values, but arithmetic that mixes them with the CPU's is an error on any
machine (matrix products are not checked).
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from clora.bank.bank import AdapterBank
from clora.flow.matching import flow_matching_losses
from clora.lora.layers import linear_shapes
from clora.lora.state import fresh_lora
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio import text
from clora.studio.making import base, text_training, vae
from clora.studio.making.pairs import Pairs, pair_losses

DEVICE = torch.device("meta")


class Pipeline:
    """The parts of a pipeline that a training loop touches."""

    is_distilled = False
    vae_scale_factor = 4

    def __init__(self, transformer):
        from diffusers import Flux2KleinPipeline as Stock

        self.config, self.transformer = self, transformer
        self._prepare_latent_ids, self._prepare_image_ids = Stock._prepare_latent_ids, Stock._prepare_image_ids
        self._prepare_text_ids = Stock._prepare_text_ids


@pytest.fixture
def adapter():
    return Flux2KleinAdapter(Pipeline(base.make_transformer().to(DEVICE)), (64, 64), text.MAX_SEQUENCE_LENGTH)


def latents(*shape):
    return torch.randn(*shape, 64, 128, device=DEVICE)


def prompts(*shape):
    return torch.randn(*shape, text.MAX_SEQUENCE_LENGTH, 96, device=DEVICE)


def test_mixing_devices_is_an_error_here_too():
    with pytest.raises(RuntimeError, match="device"):
        latents(1) + torch.zeros(1, 64, 128)


def test_flow_matching(adapter):
    conditioning = Conditioning(Text(prompts(4)), latents(4))
    losses = flow_matching_losses(lambda x, s: adapter.velocity(x, s, conditioning), latents(4), 3.0, None)
    losses.sum().backward()
    assert (losses.device, losses.shape) == (DEVICE, (4,))


def test_the_base(adapter):
    # An update's edits are encoded on the CPU.
    batch = base.Batch(torch.randn(4, 64, 128), torch.randn(4, 64, 128), torch.randn(4, text.MAX_SEQUENCE_LENGTH, 96))
    loss = base._loss(adapter, batch, torch.randn(text.MAX_SEQUENCE_LENGTH, 96), torch.Generator())
    assert loss.device == DEVICE


def test_the_teachers(adapter):
    shapes = linear_shapes(adapter.pipeline.transformer)
    generator = torch.Generator().manual_seed(0)
    loras = {name: fresh_lora(shapes, rank, generator) for name, rank in (("a", 4), ("b", 8))}
    bank = AdapterBank(adapter.pipeline.transformer, loras, dtype=torch.float32)
    pairs = Pairs(latents(2, 3), latents(2, 3), Text(prompts(2)))
    ids = torch.tensor([0, 0, 1, 1])
    losses = pair_losses(adapter, bank, bank.slots(trainable=True), pairs, ids, None)
    losses.sum().backward()
    assert (losses.device, losses.shape) == (DEVICE, (4,))


def test_the_autoencoder(monkeypatch):
    monkeypatch.setattr(vae, "reduced_precision", lambda device: nullcontext())  # there is no autocast for this device
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: 0.0)
    pictures = torch.randn(2, 3, 64, 64, device=DEVICE)
    loss, _ = vae._reconstruction_loss(vae.make_vae().to(DEVICE), pictures, torch.Generator())
    assert loss.device == DEVICE


def test_the_reading_of_the_text_encoder():
    states, mask = prompts(2), torch.ones(2, text.MAX_SEQUENCE_LENGTH, dtype=torch.int64, device=DEVICE)
    heads = torch.nn.ModuleList(torch.nn.Linear(states.shape[-1], 3) for _ in range(4)).to(DEVICE)
    labels = torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)
    assert text_training._reading_loss(heads, states, mask, labels).device == DEVICE
