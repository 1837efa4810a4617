"""What the adapters share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clora.devices import send
from clora.errors import CloraError
from clora.models.conditioning import Text
from clora.models.protocol import ModelAdapter

One = TypeVar("One")

MAX_IMAGES, MAX_PIXELS = 32, 4 * 1024 * 1024
"""Of a batch for an autoencoder."""
MAX_PROMPTS, MAX_TOKENS = 64, 4096
"""Of a batch for a text encoder."""


def check_size(size: tuple[int, int], multiple: int) -> None:
    """Raises CloraError for an image size that is no multiple of the pipeline's patches."""
    if size[0] % multiple or size[1] % multiple:
        raise CloraError(f"expected an image size in multiples of {multiple} pixels, found {size[0]}x{size[1]}")


def check_lengths(adapter: ModelAdapter, prompts: Sequence[str]) -> None:
    """Raises CloraError for a prompt of more tokens than the adapter takes."""
    for prompt in prompts:
        count = adapter.num_tokens(prompt)
        if count > adapter.max_sequence_length:
            raise CloraError(
                f"expected a prompt of at most {adapter.max_sequence_length} tokens, found {count} in {prompt!r}; "
                "shorten it or raise max_sequence_length"
            )


def check_limit(pipeline, max_sequence_length: int, limit: int) -> None:
    """Raises CloraError for a ``max_sequence_length`` above what the pipeline takes."""
    if max_sequence_length > limit:
        raise CloraError(
            f"data.max_sequence_length: {type(pipeline).__name__} takes at most {limit} tokens, "
            f"found {max_sequence_length}"
        )


def only_image(pipeline, images: Sequence[One] | None) -> One:
    """The one image of a sample, or of all samples. Raises CloraError where there is another number."""
    if images is None or len(images) != 1:
        raise CloraError(
            f"expected one image to edit, which is what {type(pipeline).__name__} takes, found {len(images or ())}"
        )
    return images[0]


def module_of(pipeline) -> ModuleType:
    """The module of a pipeline's class, which has the functions and constants that its call uses."""
    return sys.modules[type(pipeline).__module__]


def to_pil(image: Tensor) -> Image.Image:
    """A picture of ``[3, H, W]`` in [-1, 1], as a pipeline's image processor takes it."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def num_seen_tokens(image_processor, height: int, width: int) -> int:
    """Tokens that a Qwen-VL text encoder makes of a picture of this size, as the pipeline's processor cuts it."""
    grid = image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"]
    return int(grid.prod()) // image_processor.merge_size**2


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, size: tuple[int, int]) -> Tensor:
    """An autoencoder's ``function`` over as many rows at a time as its memory allows, which grows with their pixels.

    Args:
        function: encodes or decodes.
        rows: images ``[N, 3, H, W]`` or their latents.
        size: height and width of the images.
    """
    at_once = max(1, min(MAX_IMAGES, MAX_PIXELS // (size[0] * size[1])))
    return torch.cat([function(part) for part in rows.split(at_once)])


def prompt_chunks(prompts: Sequence[str], max_sequence_length: int) -> list[list[str]]:
    """Prompts in parts that a text encoder takes at once; one that is a language model makes logits of every token."""
    at_once = max(1, min(MAX_PROMPTS, MAX_TOKENS // max_sequence_length))
    return [list(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)]


def embedded_guidance(pipeline, wanted: float | None) -> float | None:
    """The guidance scale embedded in every pass: ``wanted``, by default that of a stock call; None without embedding.

    Raises:
        CloraError: one is wanted of a transformer without a guidance embedding.
    """
    if pipeline.transformer.config.guidance_embeds:
        default = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
        return float(default if wanted is None else wanted)
    if wanted is not None:
        raise no_guidance_embedding(pipeline, wanted)
    return None


def no_guidance_embedding(pipeline, wanted: float) -> CloraError:
    """The error about a guidance embedding wanted of a family that has none."""
    return CloraError(
        f"sampler.guidance_embedding = {wanted}: the transformer of {type(pipeline).__name__} has no guidance "
        "embedding; remove it, or set sampler.guidance for the pass with the empty prompt"
    )


def guidance_rows(guidance: float | None, like: Tensor) -> Tensor | None:
    """An embedded guidance scale as a pipeline hands it to its transformer: fp32 ``[B]``."""
    return None if guidance is None else torch.full((len(like),), guidance, device=like.device, dtype=torch.float32)


def stock_schedule(scheduler, steps: int, mu: float) -> Tensor:
    """Noise levels ``[steps + 1]``, the last 0, of a pipeline's call with ``steps`` steps.

    Args:
        scheduler: the pipeline's; it is left as it is.
        steps: number of steps.
        mu: the time shift that the pipeline passes for its image size, used where the scheduler shifts dynamically.
    """
    copy = type(scheduler).from_config(scheduler.config)
    if copy.config.get("use_flow_sigmas"):
        copy.set_timesteps(steps, mu=mu)
    else:
        copy.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return copy.sigmas


def linear_mu(pipeline, num_tokens: int) -> float:
    """The time shift of pipelines that take it from a line through two image sizes (``calculate_shift``)."""
    config = pipeline.scheduler.config
    return module_of(pipeline).calculate_shift(
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )


def attention_mask(text: Text, device: torch.device) -> Tensor | None:
    """The prompts' mask ``[B, L]`` as a pipeline hands it to its transformer: None where every token counts."""
    return None if text.mask is None or text.mask.all() else send(text.mask, device)


def timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise levels as a pipeline hands them to its transformer: 1000 sigma rounded to the latents' dtype, over 1000."""
    if dtype == torch.float32:
        return sigma.to(dtype)  # the last bit of the round trip is not worth it
    return (1000 * sigma).to(dtype) / 1000


def linear_names(transformer) -> list[str]:
    """Names of all linear layers inside the transformer's blocks, the default LoRA targets.

    Blocks are what diffusers calls the transformer's repeated blocks, whatever attributes hold them.
    """
    blocks = tuple(
        f"{name}."
        for name, module in transformer.named_modules()
        if type(module).__name__ in transformer._repeated_blocks
    )
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks)
    ]
