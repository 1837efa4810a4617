"""Tiny things for tests: a stock pipeline with random weights, random teachers, random encoded data."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clora.config.settings import DistillConfig
from clora.data.batches import DistillData, EffectSamples, general_pair
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.state import LoRAModule, LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.text import random_text_encoder, train_tokenizer

SIZE = (16, 16)
MAX_SEQUENCE_LENGTH = 40
SENTENCES = (
    "make it a blueprint with thin white lines",
    "turn the picture into a warm sunset",
    "add falling snow in front of everything",
    "brighten the image, keep the red circle",
)


def tiny_pipeline(seed: int = 0, is_distilled: bool = False):
    """Makes a stock ``Flux2KleinPipeline`` whose transformer has 60 000 random weights.

    16x16 pixels are 16 tokens of 16 channels; a prompt's tokens have 24 channels, 8 of each tapped layer.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(seed)
    tokenizer = train_tokenizer(SENTENCES)
    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=8,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE[0],
    )
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=random_text_encoder(len(tokenizer), 8, initializer_range=0.1),
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=is_distilled,
    )
    for model in (transformer, vae, pipeline.text_encoder):
        model.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_adapter(pipeline=None, size: tuple[int, int] = SIZE) -> Flux2KleinAdapter:
    """Makes the adapter of ``tiny_pipeline()`` or of the given one; a stock call of it takes 64 pixels or more."""
    return Flux2KleinAdapter(pipeline or tiny_pipeline(), size, MAX_SEQUENCE_LENGTH)


def random_lora(transformer: nn.Module, rank: int, seed: int, modules: Sequence[str] | None = None) -> LoRAState:
    """Makes a LoRA of random factors, on all linear layers of the blocks by default."""
    generator = torch.Generator().manual_seed(seed)
    shapes = linear_shapes(transformer)
    factors = {}
    for name in modules or block_layers(transformer):
        out_features, in_features = shapes[name]
        # Strong enough to change every output.
        lora_a = torch.randn(rank, in_features, generator=generator) * (rank * in_features) ** -0.5
        factors[name] = LoRAModule(lora_a, torch.randn(out_features, rank, generator=generator) * 0.5)
    return LoRAState(factors)


def random_teachers(transformer: nn.Module, count: int = 3) -> dict[str, LoRAState]:
    """Makes teachers ``effect_0``, ... of ranks 2, 3, 4, ...; every second one changes attention layers only."""
    attention = [name for name in block_layers(transformer) if ".attn." in name]
    return {f"effect_{i}": random_lora(transformer, 2 + i, i, attention if i % 2 else None) for i in range(count)}


def merge_lora(transformer: nn.Module, state: LoRAState | None) -> nn.Module:
    """Copies the transformer with the weights ``W + B A``, the reference of a slot of a bank."""
    merged = copy.deepcopy(transformer)
    with torch.no_grad():
        for name, module in (state.modules if state else {}).items():
            merged.get_submodule(name).weight += module.delta()
    return merged


def random_data(adapter: ModelAdapter, effects: Sequence[str], sources: int = 3) -> DistillData:
    """Makes encoded data of the adapter's shapes, all of it random and different from row to row."""
    generator = torch.Generator().manual_seed(0)
    latent = adapter.latent_shape
    text = (adapter.max_sequence_length, adapter.pipeline.transformer.config.joint_attention_dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    num_effects = len(effects)
    # The table of prompts is these four parts, one after the other: teachers', students' in two phrasings,
    # instructions, the empty one.
    counts = [num_effects, num_effects * 2, 3, 1]
    table = Text(draw(sum(counts), *text))
    teacher, student, instructions, empty = torch.arange(sum(counts)).split(counts)
    images = draw(num_effects, sources, *latent)
    targets = draw(num_effects, sources, *latent)
    asked = student.view(num_effects, 2, 1)
    samples = [
        EffectSamples(name, images[i], targets[i], teacher[i], asked[i], empty) for i, name in enumerate(effects)
    ]
    source, instruction = general_pair(torch.arange(12), 4, 3)
    pairs = torch.stack([source, instructions[instruction], empty.expand_as(source)], dim=1)
    return DistillData.of(table, samples, draw(4, *latent), pairs)


def tiny_config(effects: Sequence[str] | Sequence[Mapping[str, Any]], **sections: Any) -> DistillConfig:
    """Makes a config of two updates of six rows, without previews and tracker.

    Args:
        effects: names, or whole effect entries.
        sections: entries that replace the defaults, a mapping entry by entry (``train={"updates": 5}``).
    """
    entries = [{"name": e, "lora": e, "prompt": f"make it {e}"} if isinstance(e, str) else e for e in effects]
    tree: dict[str, Any] = {
        "pipeline": "tiny",
        "output": "out",
        "effects": tuple(entries),
        "data": {
            "sources": "images",
            "size": SIZE,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
            "general_instructions": SENTENCES[3:],
        },
        "student": {"rank": 4},
        "sampler": {"steps": 4, "teacher_steps": 2, "guidance": 1.0},
        "train": {
            "updates": 2,
            "critic_ratio": 2,
            "batch_size": 6,
            "learning_rate": 1e-2,
            "critic_learning_rate": 1e-2,
            "preview_every": 0,
            "tracker": None,
        },
        "device": "cpu",
        "dtype": "float32",  # the same on every CPU
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, Mapping) else value
    return DistillConfig.model_validate(tree)
