"""A stock ``LongCatImageEditPipeline`` at tiny sizes with random weights."""

from __future__ import annotations

import torch
from helpers.tiny_parts import autoencoder, ready, without_videos

from clora.models.families.longcat_image import LongCatImageEditAdapter
from clora.studio.text import train_tokenizer
from clora.testing import SENTENCES

AREA = 64 * 64  # pixels, instead of the pipeline's megapixel
MAX_SEQUENCE_LENGTH = 48
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def shrink(monkeypatch) -> None:
    """Pictures are brought to `AREA`."""
    from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit as module

    real = module.calculate_dimensions
    monkeypatch.setattr(module, "calculate_dimensions", lambda area, ratio: real(area // 256, ratio))


def tiny_pipeline(seed: int = 0):
    """16x16 pixels are one token of 64 channels; the text encoder sees 16x16 pixels as one token of 24 channels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageEditPipeline, LongCatImageTransformer2DModel

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(SENTENCES)
    tokenizer.add_tokens(VISION, special_tokens=True)
    pipeline = LongCatImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=64, base_shift=0.5, max_shift=1.15
        ),
        vae=autoencoder(),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_processor=_processor(tokenizer),
        transformer=LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=24,
            axes_dims_rope=[4, 6, 6],
        ),
    )
    pipeline.tokenizer_max_length = MAX_SEQUENCE_LENGTH
    return ready(pipeline)


def _text_encoder(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 24,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.3,
    }
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


def _processor(tokenizer):
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor

    images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=64 * 64)
    return without_videos(Qwen2VLProcessor)(images, tokenizer, video_processor=None)


def tiny_adapter(pipeline=None, size: tuple[int, int] = (64, 80)) -> LongCatImageEditAdapter:
    """The adapter of ``tiny_pipeline()`` or of the given one; after `shrink`."""
    return LongCatImageEditAdapter(pipeline or tiny_pipeline(), size, MAX_SEQUENCE_LENGTH)
