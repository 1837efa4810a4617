"""Tiny FLUX pipelines of the real classes with random weights, and the same samples by a stock call and by clora."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from helpers.edits import Sample, start_noise
from helpers.tiny_parts import ready

from clora.lora.save import save_lora
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.testing import SENTENCES, tiny_pipeline

# What the published FLUX pipelines ship.
SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
SYSTEM_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def tiny_klein():
    """A ``Flux2KleinPipeline`` with the patches of 16 pixels and the scheduler of the real one."""
    from diffusers import Flux2KleinPipeline

    return ready(Flux2KleinPipeline(**{**tiny_pipeline().components, "vae": _flux2_vae(), "scheduler": _scheduler()}))


def tiny_flux2():
    """A ``Flux2Pipeline``: guidance embedding, Mistral3 text encoder.

    Its tokenizer has the chat template of a processor without the processor, which needs torchvision.
    """
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    from clora.studio.text import train_tokenizer

    torch.manual_seed(1)
    tokenizer = train_tokenizer([*SENTENCES, SYSTEM_MESSAGE])
    tokenizer.chat_template = SYSTEM_TEMPLATE
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )
    return ready(
        Flux2Pipeline(
            scheduler=_scheduler(),
            vae=_flux2_vae(),
            text_encoder=_mistral(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=transformer,
        )
    )


def tiny_kontext():
    """A ``FluxKontextPipeline``: guidance embedding, CLIP and T5, patches of 16 pixels."""
    from diffusers import AutoencoderKL, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(2)
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    vae = AutoencoderKL(
        **_vae("DownEncoderBlock2D", "UpDecoderBlock2D"),
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip_config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=12,
        intermediate_size=24,
        projection_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=clip.bos_token_id,
        eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    t5_config = T5Config(vocab_size=len(t5), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return ready(
        FluxKontextPipeline(
            scheduler=_scheduler(),
            vae=vae,
            text_encoder=CLIPTextModel(clip_config),
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(t5_config),
            tokenizer_2=t5,
            transformer=transformer,
        )
    )


def _scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def _vae(down: str, up: str) -> dict[str, Any]:
    return {
        "down_block_types": (down,) * 4,
        "up_block_types": (up,) * 4,
        "block_out_channels": (8,) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,  # slow on references of a megapixel
    }


def _flux2_vae():
    from diffusers import AutoencoderKLFlux2

    torch.manual_seed(3)
    vae = AutoencoderKLFlux2(**_vae("DownEncoderBlock2D", "UpDecoderBlock2D"))
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def _mistral(vocabulary: int):
    """30 layers x 8: the pipeline taps layers 10, 20 and 30."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral",
        "vocab_size": vocabulary,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 30,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "initializer_range": 0.1,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def _clip_tokenizer():
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + string.punctuation
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5_tokenizer():
    from transformers import T5TokenizerFast

    letters = string.ascii_letters + string.digits + string.punctuation
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(vocab=[*specials, *((letter, -3.0) for letter in "▁" + letters)], extra_ids=0)


@dataclass(frozen=True)
class Family:
    """A pipeline family.

    Attributes:
        make: a tiny pipeline.
        length: text tokens that hold every prompt used here.
        several: True if the pipeline takes several references.
    """

    make: Callable[[], Any]
    length: int
    several: bool

    def latents(self, packed: torch.Tensor, adapter: ModelAdapter) -> torch.Tensor:
        """Packed noise as the stock call takes it."""
        if self is KONTEXT:
            return packed
        grid = tuple(side // (2 * adapter.pipeline.vae_scale_factor) for side in adapter.size)
        return packed.transpose(1, 2).unflatten(2, grid)

    def area(self, size: tuple[int, int]) -> dict[str, int]:
        """What else the stock call needs to make pictures of a size."""
        return {"max_area": math.prod(size)} if self is KONTEXT else {}


KLEIN = Family(tiny_klein, 40, True)
FLUX2 = Family(tiny_flux2, 96, True)
KONTEXT = Family(tiny_kontext, 60, False)
FAMILIES = {"klein": KLEIN, "flux2": FLUX2, "kontext": KONTEXT}


def stock_call(
    family: Family,
    adapter: ModelAdapter,
    sample: Sample,
    folder,
    loras: Mapping[str, LoRAState],
    scheduler=None,
    noise: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """A stock call of the pipeline with the sample's LoRA loaded; ``scheduler`` None for the pipeline's own."""
    own = adapter.pipeline
    pipeline = type(own)(**{**own.components, "scheduler": scheduler or own.scheduler})
    pipeline.set_progress_bar_config(disable=True)
    if sample.lora is not None:
        file = folder / f"{sample.lora}.safetensors"
        save_lora(loras[sample.lora], file)
        pipeline.load_lora_weights(file)
    noise = start_noise(adapter, sample) if noise is None else noise
    arguments = {"num_inference_steps": 8, "output_type": "pt", "max_sequence_length": family.length, **kwargs}
    height, width = adapter.size
    try:
        torch.manual_seed(sample.seed)
        return pipeline(
            image=list(sample.images) if family.several else sample.images[0],
            prompt=sample.prompt,
            latents=family.latents(noise, adapter),
            height=height,
            width=width,
            **family.area(adapter.size),
            **arguments,
        ).images
    finally:
        if sample.lora is not None:
            pipeline.unload_lora_weights()


@contextmanager
def received(transformer):
    """Yields a list of the keyword arguments of every call of the transformer inside."""
    calls: list[dict[str, Any]] = []
    handle = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()
