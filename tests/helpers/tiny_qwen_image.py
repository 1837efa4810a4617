"""Tiny stock Qwen-Image edit pipelines with random weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from helpers.tiny_parts import ready, without_videos

from clora.testing import SENTENCES

VISION = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
SPECIAL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEXT_CHANNELS = 16
SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
"""The pipelines' system prompt, of which they drop the first 64 tokens."""
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""What Qwen's own pipelines ship: dynamic shift, stretched to end at 0.02."""


def tiny_qwen_pipeline(name: str = "QwenImageEditPlusPipeline", zero_cond_t: bool = False, seed: int = 0):
    """A stock edit pipeline; 16x16 pixels are a token of 16 channels, ``zero_cond_t`` as in Qwen-Image-Edit-2511."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    for block in transformer.transformer_blocks:
        block.attn.norm_q.weight.data *= 4  # attention that picks tokens: with an even one no prompt has an effect
    pipeline = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=_vae(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        processor=_processor(tokenizer),
        transformer=transformer,
    )
    return ready(pipeline)


def tiny_qwen21_pipeline(seed: int = 0):
    """A stock ``QwenImage21Pipeline``; 16x16 pixels are a token of 8 channels."""
    import diffusers

    torch.manual_seed(seed)
    tokenizer = _tokenizer()
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=TEXT_CHANNELS,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = diffusers.QwenImage21Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=_vae21(),
        text_encoder=_text_encoder21(tokenizer),
        processor=_processor(tokenizer, "Qwen3VLProcessor", patch_size=16),
        transformer=transformer,
    )
    return ready(pipeline)


def shrink(monkeypatch, pipeline) -> None:
    """Makes the pipeline's own areas small: of sources (1024 x 1024) and of what the text encoder sees (384 x 384)."""
    module = sys.modules[type(pipeline).__module__]
    calculate, areas = module.calculate_dimensions, {1024 * 1024: 96 * 96, 384 * 384: 80 * 80}
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: calculate(areas[area], ratio))


def _tokenizer():
    from clora.studio.text import train_tokenizer

    tokenizer = train_tokenizer([*SENTENCES, SYSTEM])
    tokenizer.add_tokens(list(SPECIAL), special_tokens=True)
    tokenizer.model_max_length = 1024
    return tokenizer


def _vae():
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.3, 0.1, 0.2, -0.1],
        latents_std=[0.8, 1.1, 0.6, 1.4],
    )
    return _contrasting(vae)


def _vae21():
    from diffusers import AutoencoderKLQwenImage21

    vae = AutoencoderKLQwenImage21(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.3, 0.1, 0.2, -0.1, 0.0, 0.2, 0.3, -0.2],
        latents_std=[0.8, 1.1, 0.6, 1.4, 0.7, 0.9, 1.0, 1.2],
    )
    return _contrasting(vae)


def _contrasting(vae):
    vae.decoder.conv_out.weight.data *= 10  # else all images are nearly grey
    return vae


def _text_encoder(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"hidden_size": 16, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**_sizes(tokenizer, vision)))


def _text_encoder21(tokenizer):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {"hidden_size": 16, "patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**_sizes(tokenizer, vision)))


def _sizes(tokenizer, vision: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a vision-language model tiny, and the tokens of its images."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_CHANNELS,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": TEXT_CHANNELS // 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    blocks = {"depth": 2, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": TEXT_CHANNELS}
    tokens = {key: tokenizer.convert_tokens_to_ids(token) for key, token in VISION.items()}
    return {"text_config": text, "vision_config": {**blocks, "initializer_range": 0.2, **vision}, **tokens}


def _processor(tokenizer, name: str = "Qwen2VLProcessor", patch_size: int = 14):
    """The stock processor; where there is no torchvision, which its part for videos needs, without that part."""
    import transformers
    from transformers.utils import is_torchvision_available

    limits = {"min_pixels": 28 * 28, "max_pixels": 128 * 128}
    images = transformers.Qwen2VLImageProcessor(patch_size=patch_size, **limits)
    kind = getattr(transformers, name)
    if is_torchvision_available():
        videos = getattr(transformers, name.replace("Processor", "VideoProcessor"))(patch_size=patch_size)
        return kind(images, tokenizer, video_processor=videos, chat_template=CHAT_TEMPLATE)

    return without_videos(kind)(images, tokenizer, video_processor=None, chat_template=CHAT_TEMPLATE)
