"""A stock ``ZImageOmniPipeline`` at tiny sizes with random weights."""

from __future__ import annotations

import torch
from helpers.tiny_parts import autoencoder, ready

from clora.models.families.z_image import ZImageOmniAdapter
from clora.studio.text import train_tokenizer
from clora.testing import SENTENCES

MAX_SEQUENCE_LENGTH = 56
VISION = ["<|vision_start|>", "<|vision_end|>"]


def tiny_pipeline(seed: int = 0):
    """16x16 pixels are one token of 64 channels; an image has up to 12 features of 128 channels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageOmniPipeline, ZImageTransformer2DModel
    from transformers import Siglip2ImageProcessor

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(SENTENCES)
    tokenizer.add_tokens(VISION, special_tokens=True)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        siglip_feat_dim=128,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    for padding in (transformer.x_pad_token, transformer.cap_pad_token, transformer.siglip_pad_token):
        torch.nn.init.normal_(padding)  # zeros where untrained, which would hide padding at a wrong place
    pipeline = ZImageOmniPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=autoencoder(),
        text_encoder=_text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=transformer,
        siglip=_siglip(),
        siglip_processor=Siglip2ImageProcessor(patch_size=16, max_num_patches=12),
    )
    return ready(pipeline)


def _text_encoder(vocabulary: int):
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    )


def _siglip():
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    return Siglip2VisionModel(
        Siglip2VisionConfig(
            hidden_size=128,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_patches=16,
            patch_size=16,
        )
    )


def tiny_adapter(pipeline=None, size: tuple[int, int] = (64, 80)) -> ZImageOmniAdapter:
    """The adapter of ``tiny_pipeline()`` or of the given one; a stock call takes images of 64 pixels or more."""
    return ZImageOmniAdapter(pipeline or tiny_pipeline(), size, MAX_SEQUENCE_LENGTH)
