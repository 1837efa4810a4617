"""A small model of Qwen-Image's kind with random weights, and all that an update of it needs.

Everything is drawn from fixed seeds, so that each process makes the same weights, LoRAs, data and draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clora.config.settings import DistillConfig
from clora.data.batches import DistillData
from clora.lora.layers import block_layers
from clora.lora.state import LoRAState
from clora.models.families.qwen_image import QwenImageEditPlusAdapter
from clora.testing import random_data, random_lora, tiny_config

PIXELS = 16
"""Pixels on each side of a token: 8 of the autoencoder, 2 of the patch."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A model's size, the LoRAs, and the batch of an update.

    Attributes:
        layers, heads, head_size: of the transformer; Qwen-Image has 60, 24 and 128.
        axes: channels of a head that turn with frame, row and column.
        text_width: channels of a prompt's token.
        grid: tokens on each side of the result, and of the picture to edit.
        text_tokens: of a prompt.
        samples: in the batch.
        teachers: their number.
        student_rank, teacher_rank: of the LoRAs, which change all layers of the blocks.
        dtype: of the transformer.
    """

    name: str
    layers: int
    heads: int
    head_size: int
    axes: tuple[int, int, int]
    text_width: int
    grid: int
    samples: int
    text_tokens: int = 32
    teachers: int = 6
    student_rank: int = 32
    teacher_rank: int = 16
    dtype: str = "float32"


SMALL = {"layers": 5, "heads": 4, "head_size": 32, "axes": (8, 12, 12), "text_width": 96}
"""3 million parameters."""
MEDIUM = {"layers": 5, "heads": 6, "head_size": 128, "axes": (16, 56, 56), "text_width": 768}
"""109 million parameters."""
CPU_CASES = (
    StepCase(name="step-100m", grid=8, samples=4, **MEDIUM),
    StepCase(name="step-3m", grid=8, samples=4, **SMALL),
)
GPU_CASES = (
    StepCase(name="step-100m", grid=16, samples=8, dtype="bfloat16", **MEDIUM),
    StepCase(name="step-3m", grid=16, samples=8, dtype="bfloat16", **SMALL),
)


class World:
    """The parts of an update, made when they are asked for.

    Args:
        case: the sizes.
        device: of the transformers and the batches.
        updates: number of updates that will be made.
    """

    def __init__(self, case: StepCase, device: torch.device, updates: int):
        self.case = case
        self.device = device
        self.effects = tuple(f"effect_{i}" for i in range(case.teachers))
        self.config = make_config(case, self.effects, updates)

    def adapter(self) -> QwenImageEditPlusAdapter:
        """Makes a transformer, the same each time, in a stock pipeline without encoders, and the adapter around it."""
        from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline, QwenImageTransformer2DModel

        case = self.case
        torch.manual_seed(SEED)
        transformer = QwenImageTransformer2DModel(
            num_layers=case.layers,
            num_attention_heads=case.heads,
            attention_head_dim=case.head_size,
            axes_dims_rope=case.axes,
            joint_attention_dim=case.text_width,
        )
        # By torch's own method: diffusers' warns of layers to be kept in fp32, though this class names none.
        torch.nn.Module.to(transformer, self.device, getattr(torch, case.dtype))
        transformer.eval().requires_grad_(False)
        pipeline = QwenImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            processor=None,
            transformer=transformer,
        )
        adapter = QwenImageEditPlusAdapter(pipeline, self.config.data.size, case.text_tokens)
        # The pipeline brings pictures to edit to a megapixel; here they are as large as the result.
        adapter.source_shapes = ((case.grid, case.grid),)
        return adapter

    def teachers(self, transformer: torch.nn.Module) -> dict[str, LoRAState]:
        """Makes the teachers by effect, on all layers of the plain transformer's blocks."""
        layers = block_layers(transformer)
        return {
            effect: random_lora(transformer, self.case.teacher_rank, seed, layers)
            for seed, effect in enumerate(self.effects)
        }

    def data(self, adapter: QwenImageEditPlusAdapter) -> DistillData:
        """Makes random encoded data."""
        return random_data(adapter, self.effects)


def make_config(case: StepCase, effects: Sequence[str], updates: int) -> DistillConfig:
    """Makes the settings of all ways: the method's own, one critic update for each update of the student."""
    return tiny_config(
        effects,
        data={"size": (PIXELS * case.grid,) * 2, "max_sequence_length": case.text_tokens},
        student={"rank": case.student_rank},
        sampler={"steps": 8, "guidance": 4.0},
        train={
            "updates": updates,
            "critic_ratio": 1,
            "batch_size": case.samples,
            # Far above what is usual: after one update a wrong gradient shows in the next losses.
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "schedule": "constant",
        },
    )
