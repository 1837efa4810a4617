"""Gradient checkpointing on the kernels: blocks that are computed again have the same gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pydantic")
pytest.importorskip("diffusers")

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.models.conditioning import Conditioning, Text
from clora.testing import random_lora, tiny_adapter, tiny_pipeline
from csrc_triton import replay
from csrc_triton.multi_lora import launch
from csrc_triton.registration import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
MODULES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_out")


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names, wrap = [], launch.wrap_triton
    monkeypatch.setattr(replay, "enabled", False)
    monkeypatch.setattr(launch, "wrap_triton", lambda kernel: names.append(kernel.__name__) or wrap(kernel))
    return names


def test_gradients_are_the_same_with_and_without(monkeypatch, launched):
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    monkeypatch.setenv("CLORA_DESIGN", "split")  # nothing is merged, which needs no kernel
    adapter = tiny_adapter(tiny_pipeline().to(DEVICE))
    transformer = adapter.pipeline.transformer
    bank = AdapterBank(transformer, {str(seed): random_lora(transformer, 2, seed, MODULES) for seed in range(2)})
    slots, ids = bank.slots(trainable=True), torch.tensor([1, -1], device=DEVICE)
    x, source = torch.randn(2, 2, *adapter.latent_shape, device=DEVICE)
    text = torch.randn(2, adapter.max_sequence_length, transformer.config.joint_attention_dim, device=DEVICE)
    conditioning = Conditioning(Text(text), source)

    def gradients():
        launched.clear()
        with bank.route(slots, ids):
            velocity = adapter.velocity(x, torch.full((2,), 0.5, device=DEVICE), conditioning)
        return torch.autograd.grad(velocity.square().sum(), slots.parameters()), launched.count("shrink_kernel")

    expected, launches = gradients()
    with recomputed_blocks(bank):
        found, more_launches = gradients()
    assert more_launches == launches + len(MODULES)
    assert all(gradient.any() for gradient in expected)
    assert all(torch.equal(gradient, other) for gradient, other in zip(found, expected, strict=True))
