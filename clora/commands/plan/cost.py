"""The cost of one pass of a transformer, counted on fake tensors, and the capacity of the device."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.bank.slots import Slots
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import fresh_lora
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning, Text
from clora.training.memory import kept_bytes

# Names of one setting in diffusers' transformers.
_TEXT_CHANNELS = ("joint_attention_dim", "cap_feat_dim", "context_in_dim")
# Side of the matrices that are multiplied to measure a device, and repetitions.
_SIDE = {"cuda": 8192, "mps": 4096, "cpu": 1024}
_ROUNDS = 5


class Uncounted(CloraError):
    """A pass that cannot be counted without weights: no mistake of the user's."""

    def __init__(self, adapter: ModelAdapter, reason: object):
        super().__init__(
            f"clora plan cannot run {type(adapter.pipeline).__name__} without its weights ({reason}): its memory, disk, "
            "passes and time are unknown; all else was checked"
        )


@dataclass(frozen=True)
class PassCost:
    """One sample's share of a pass with gradient.

    Attributes:
        flops: floating-point operations of the forward pass, LoRA of the student's rank included.
        saved: bytes kept for the backward pass.
        saved_checkpointed: the same with gradient checkpointing.
        inputs: vectors that each of the student's layers reads.
    """

    flops: float
    saved: int
    saved_checkpointed: int
    inputs: Mapping[str, int] = field(default_factory=dict)


def pass_cost(adapter: ModelAdapter, layers: list[str], rank: int, text_shape: tuple[int, int]) -> PassCost:
    """Counts one sample's forward pass through a bank of one trainable LoRA.

    Args:
        adapter: of a pipeline on fake tensors (`clora.models.skeleton`).
        layers: the student's layers.
        rank: its rank.
        text_shape: tokens and channels of a prompt.

    Raises:
        CloraError: the family's pass cannot run on fake tensors.
    """
    from torch.utils.flop_counter import FlopCounterMode

    transformer = adapter.pipeline.transformer
    with next(transformer.parameters()).fake_mode:
        lora = fresh_lora(linear_shapes(transformer), rank, torch.Generator(), layers)
        with AdapterBank(transformer, {"student": lora}) as bank:
            try:
                # One slot, for the student: the two products of its LoRA are part of every pass.
                slots = bank.trained("student", lora)
                counter = FlopCounterMode(display=False)
                inputs: dict[str, int] = {}
                with counter, bank.observed(lambda layer, x: inputs.update({layer: x.shape[:-1].numel()})):
                    saved = _saved_bytes(adapter, bank, slots, text_shape)
                with recomputed_blocks(bank):
                    checkpointed = _saved_bytes(adapter, bank, slots, text_shape)
            except Exception as error:  # a pass that reads values, or wants more than zeros, raises whatever it meets
                raise Uncounted(adapter, error) from error
    return PassCost(counter.get_total_flops(), saved, checkpointed, inputs)


def _saved_bytes(adapter: ModelAdapter, bank: AdapterBank, slots: Slots, text_shape: tuple[int, int]) -> int:
    """Runs one pass with gradient and returns the bytes that it keeps, parameters and factors not counted."""
    transformer = adapter.pipeline.transformer

    def run() -> Tensor:
        source = torch.zeros(1, source_rows(adapter), adapter.latent_shape[1], dtype=transformer.dtype)
        noise = torch.zeros(1, *adapter.latent_shape, dtype=transformer.dtype)
        with bank.route(slots, torch.zeros(1, dtype=torch.int64)):
            return adapter.velocity(noise, torch.zeros(1), Conditioning(_text(adapter, text_shape), source))

    # Weights and factors stay anyway: only what the pass adds is counted.
    with _RealInputs():
        return kept_bytes(run, (*transformer.parameters(), *slots.parameters()))


class _RealInputs(TorchDispatchMode):
    """Inside, only what depends on a fake tensor stays fake; a transformer reads the values of masks and positions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs)))
        with nullcontext() if is_fake else unset_fake_temporarily():
            return func(*args, **kwargs)


def _text(adapter: ModelAdapter, shape: tuple[int, int]) -> Text:
    """A prompt of this many tokens and channels, laid out as the family reads it."""
    config = adapter.pipeline.transformer.config
    dtype = adapter.pipeline.transformer.dtype
    embeds = torch.ones(1, *shape, dtype=dtype)
    mask = None
    if "context_in_dim" in config:  # Qwen-Image 2.1 finds its images' places by their zeros
        embeds[:, : adapter.image_tokens] = 0
    if "cap_feat_dim" in config:
        # Z-Image has short segments before and after that of the prompt, with a masked row after each.
        embeds = torch.ones(1, shape[0] + 5, shape[1], dtype=dtype)
        mask = torch.ones(1, shape[0] + 5, dtype=torch.bool)
        mask[:, [1, -3, -1]] = False
    pooled = torch.zeros(1, config.pooled_projection_dim) if "pooled_projection_dim" in config else None
    return Text(embeds, mask, pooled)


def text_shape(adapter: ModelAdapter) -> tuple[int, int]:
    """Returns tokens and channels of the longest prompt, with its image; the few tokens of a template are left out.

    Raises:
        CloraError: the transformer's config does not state the channels.
    """
    config = adapter.pipeline.transformer.config
    channels = next((config[key] for key in _TEXT_CHANNELS if key in config), None)
    if channels is None:
        raise Uncounted(adapter, f"none of {', '.join(_TEXT_CHANNELS)} in its transformer's config")
    return adapter.max_sequence_length + adapter.image_tokens, channels


def source_rows(adapter: ModelAdapter) -> int:
    """Counts the rows of a source (`clora.models.conditioning.Conditioning`)."""
    shapes = adapter.source_shapes
    config = adapter.pipeline.transformer.config
    if "siglip_feat_dim" not in config:
        return sum(map(prod, shapes))
    # Z-Image: latents, then features, which are wider than latents, so that one takes several rows.
    latents, features = shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :]
    return sum(map(prod, latents)) + sum(map(prod, features)) * config.siglip_feat_dim // adapter.latent_shape[1]


def num_tokens(adapter: ModelAdapter) -> int:
    """Counts the tokens of a row: result, images to edit, text."""
    text = text_shape(adapter)[0]
    if "context_in_dim" in adapter.pipeline.transformer.config:
        text -= adapter.image_tokens  # Qwen-Image 2.1 puts the images to edit into their places in the text
    return adapter.latent_shape[0] + sum(map(prod, adapter.source_shapes)) + text


def count_blocks(transformer: torch.nn.Module) -> int:
    """Counts the transformer's blocks, which gradient checkpointing computes again one by one."""
    return sum(type(module).__name__ in transformer._repeated_blocks for module in transformer.modules())


def device_memory(device: torch.device) -> int | None:
    """Returns the bytes of the device's memory, for the CPU the machine's; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    names = getattr(os, "sysconf_names", {})  # not on Windows
    if device.type == "cpu" and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of a square matrix product, the best of a few rounds; under a second."""
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))

    def product() -> float:
        start = time.perf_counter()
        a @ b
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter() - start

    product()  # the first also loads the device's library
    # 2 n^3 operations: a multiplication and an addition for each of n^3 terms.
    return 2 * side**3 / min(product() for _ in range(_ROUNDS))
