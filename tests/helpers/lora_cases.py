"""Tiny transformers of every family, and random LoRA files written by each format's own rules.

Nothing here uses clora: the updates are computed from the tensors that go into the file.
"""

from __future__ import annotations

import diffusers
import torch
from safetensors.torch import save_file


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=12,
        in_channels=16,
        out_channels=4,
        axes_dims_rope=(2, 2, 4),
    )


def flux1():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        in_channels=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )


def flux2():
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=12,
        in_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        timestep_guidance_channels=8,
        guidance_embeds=True,
    )


def z_image():
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        siglip_feat_dim=10,
        axes_dims=[2, 2, 4],
        axes_lens=[8, 8, 8],
    )


def qwen_image21():
    return diffusers.QwenImage21Transformer2DModel(
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        context_in_dim=12,
        in_channels=4,
        out_channels=4,
        axes_dims_rope=(2, 2, 4),
    )


def longcat_image():
    from diffusers import LongCatImageTransformer2DModel

    return LongCatImageTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        in_channels=16,
        axes_dims_rope=(2, 2, 4),
    )


TRANSFORMERS = {
    "Qwen-Image": qwen_image,
    "FLUX.1": flux1,
    "FLUX.2": flux2,
    "Z-Image": z_image,
    "LongCat-Image": longcat_image,
}
if hasattr(diffusers, "QwenImage21Transformer2DModel"):
    TRANSFORMERS["Qwen-Image-2.1"] = qwen_image21


class Random:
    """Random tensors of one seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape):
        return torch.randn(*shape, generator=self.generator) * 0.5

    def integer(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pair(self, shape, rank):
        """``lora_A [rank, in]`` and ``lora_B [out, rank]`` for a weight of ``shape`` (out, in)."""
        return self.matrix(rank, shape[1]), self.matrix(shape[0], rank)


def product(lora_A, lora_B, scale=1.0):
    """``scale * B A`` in fp64."""
    return scale * (lora_B.double() @ lora_A.double())


def write(path, tensors, metadata=None):
    """Writes a safetensors file as it is."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def assert_changes(state, expected, tolerance=1e-6):
    """The state changes exactly the expected modules, by the expected fp64 matrices.

    The tolerance is relative to the products that are summed: fp32 factors round each of them, and they may cancel.
    """
    assert set(state.modules) == set(expected)
    for name, delta in expected.items():
        module = state.modules[name]
        assert module.lora_A.dtype == module.lora_B.dtype == torch.float32
        found = module.lora_B.double() @ module.lora_A.double()
        assert found.shape == delta.shape, name
        summed = module.lora_B.double().abs() @ module.lora_A.double().abs()
        assert (found - delta).norm() <= tolerance * summed.norm(), name
