"""`FamilyAdapter`, the base of the adapters of all model families, and functions that they share."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from math import prod
from types import ModuleType
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clora.errors import CloraError
from clora.models.conditioning import Conditioning, Shapes, Text
from clora.models.protocol import ModelAdapter

One = TypeVar("One")

MEGAPIXEL = 1024 * 1024
"""The area to which pipelines bring images to edit, or above which they make them smaller."""
# The largest batch of an autoencoder, and that of a text encoder.
MAX_IMAGES = 32
MAX_PIXELS = 4 * 1024 * 1024
MAX_PROMPTS = 64
MAX_TOKENS = 4096


class FamilyAdapter(ABC):
    """The part of a `ModelAdapter` on which the families agree; a subclass adds what its pipeline does in its own way.

    Args:
        pipeline: a diffusers pipeline of the family.
        size: ``(height, width)`` of the results in pixels, multiples of the pipeline's patch size.
        max_sequence_length: text tokens of a prompt; a longer prompt is an error, never a silent cut.

    Raises:
        CloraError: the size does not fit the patch size.
    """

    text_sees_image = False
    image_tokens = 0
    default_guidance = 0.0
    stock_guidance = 0.0
    stock_norm_rescale = False
    guidance_embedding: float | None = None
    _patch = 2  # latent pixels on each side of a token
    _takes_one_image = False  # the pipeline edits one image, not several

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        multiple = pipeline.vae_scale_factor * 2
        if size[0] % multiple or size[1] % multiple:
            raise CloraError(f"data.size: expected multiples of {multiple} pixels, found {size[0]}x{size[1]}")
        self.pipeline = pipeline
        self.size = size
        self.max_sequence_length = max_sequence_length
        self.student_call = {"guidance_scale": 1.0}
        self._token = pipeline.vae_scale_factor * self._patch  # its pixels on each side
        self._grid = self._grid_of(*size)
        self.latent_shape = (prod(self._grid), pipeline.transformer.config.in_channels)
        self.source_shapes: Shapes = (self._grid,)

    @property
    def latent_dtype(self) -> torch.dtype:
        """See `ModelAdapter`."""
        return self.pipeline.transformer.dtype

    @property
    def _module(self) -> ModuleType:
        """The module of the pipeline's class, with the functions and constants that its call uses."""
        return sys.modules[type(self.pipeline).__module__]

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in tokens of an image in pixels."""
        return height // self._token, width // self._token

    @abstractmethod
    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`."""
        check_lengths(self, prompts)
        return Text.cat(list(self._encode_prompts(prompts, references)))

    @abstractmethod
    def _encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None) -> Iterable[Text]:
        """Encodes prompts that are short enough, in parts, each on the CPU."""

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`. Raises CloraError for several images if the pipeline takes one."""
        if self._takes_one_image:
            references = [only_image(self.pipeline, references)]
        fitted = [self._fit(images) for images in references]
        # The tokens of all images in one sequence [N, S, C], image after image; their sizes separate them again.
        latents = torch.cat([self.encode_images(images) for images in fitted], dim=1)
        return latents, tuple(self._grid_of(*images.shape[-2:]) for images in fitted)

    def _scaled(self, size: tuple[int, int], area: int) -> tuple[int, int]:
        """Returns the height and width, of about this area, to which a pipeline that scales brings an image."""
        width, height = self._module.calculate_dimensions(area, size[1] / size[0])[:2]
        return height, width

    def _reduced(self, image: Tensor, area: int) -> Image.Image:
        """Returns a picture ``[3, H, W]``, scaled down to this area if it has more than a megapixel."""
        picture = to_pil(image)
        if picture.width * picture.height <= MEGAPIXEL:
            return picture
        return self.pipeline.image_processor._resize_to_target_area(picture, area)

    def _cropped(self, picture: Image.Image) -> Tensor:
        """Crops a picture to whole patches, ``[1, 3, H, W]``, as pipelines do that take references of any size."""
        height, width = (side * self._token for side in self._grid_of(picture.height, picture.width))
        return self.pipeline.image_processor.preprocess(picture, height=height, width=width, resize_mode="crop")

    def _fit(self, images: Tensor) -> Tensor:
        """Resizes references ``[N, 3, H, W]`` as the pipeline does for its autoencoder; by default not at all."""
        return images

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ModelAdapter.encode_images`; takes any size that is a multiple of the patch size."""
        # To the CPU, part by part: the latents of a whole data set need not fit on a GPU.
        device = self.pipeline.vae.device
        return in_chunks(lambda part: self._encode(part.to(device)).cpu(), images, images.shape[-2:])

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Returns packed latents ``[N, T, C]`` of images ``[N, 3, H, W]`` on the autoencoder's device."""

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ModelAdapter.decode`."""
        device = self.pipeline.vae.device
        return in_chunks(lambda part: self._decode(part.to(device)).cpu(), latents, self.size)

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Returns images ``[N, 3, H, W]`` of packed latents ``[N, T, C]`` on the autoencoder's device."""

    def teacher_schedule(self, steps: int) -> Tensor:
        """See `ModelAdapter.teacher_schedule`."""
        return stock_schedule(self.pipeline.scheduler, steps, self._time_shift(steps))

    def _time_shift(self, steps: int) -> float:
        """Returns the shift ``mu`` that a stock call passes to its scheduler: by default by a line through two sizes."""
        # Larger images need more noise to lose the same share of their content, so mu grows with the result's tokens.
        # The tokens of the images to edit do not count.
        config = self.pipeline.scheduler.config
        return self._module.calculate_shift(
            self.latent_shape[0],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )

    @abstractmethod
    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, **inputs) -> Tensor:
        """Returns the velocity of a transformer that reads one sequence: the noisy tokens, then those of the source.

        Args:
            x: noisy packed latents ``[B, T, C]``.
            sigma: noise levels ``[B]``.
            conditioning: ``B`` rows.
            inputs: the other arguments of the transformer.
        """
        transformer = self.pipeline.transformer
        output = transformer(
            hidden_states=torch.cat([x, conditioning.source.to(x)], dim=1).to(transformer.dtype),
            encoder_hidden_states=conditioning.text.embeds.to(transformer.dtype),
            timestep=timestep(sigma, transformer.dtype),
            return_dict=False,
            **inputs,
        )[0]
        # It predicts [B, T + S, C]; what it predicts for the source's tokens has no use.
        return output[:, : x.shape[1]]


def check_lengths(adapter: ModelAdapter | FamilyAdapter, prompts: Sequence[str]) -> None:
    """Raises CloraError for prompts of more tokens than the adapter takes; it names the longest."""
    counts = {prompt: adapter.num_tokens(prompt) for prompt in prompts}
    longer = [prompt for prompt, count in counts.items() if count > adapter.max_sequence_length]
    if longer:
        longest = max(longer, key=lambda prompt: counts[prompt])
        others = f" ({len(longer) - 1} more are too long)" if len(longer) > 1 else ""
        raise CloraError(
            f"expected a prompt of at most {adapter.max_sequence_length} tokens, found {counts[longest]} in {longest!r}"
            f"{others}; shorten it or raise data.max_sequence_length to {counts[longest]}"
        )


def check_limit(pipeline, max_sequence_length: int, limit: int) -> None:
    """Raises CloraError for a ``max_sequence_length`` above what the pipeline takes."""
    if max_sequence_length > limit:
        raise CloraError(
            f"data.max_sequence_length: {type(pipeline).__name__} takes at most {limit} tokens, "
            f"found {max_sequence_length}"
        )


def only_image(pipeline, images: Sequence[One] | None) -> One:
    """Returns the one image of a sample, or of all samples. Raises CloraError for any other number of images."""
    if images is None or len(images) != 1:
        raise CloraError(
            f"expected one image to edit, which is what {type(pipeline).__name__} takes, found {len(images or ())}"
        )
    return images[0]


def to_pil(image: Tensor) -> Image.Image:
    """Returns a picture ``[3, H, W]`` in [-1, 1] as a pipeline's image processor takes it."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def num_seen_tokens(image_processor, height: int, width: int) -> int:
    """Returns the number of tokens that a Qwen-VL text encoder makes of a picture of this size."""
    grid = image_processor(images=[Image.new("RGB", (width, height))], return_tensors="pt")["image_grid_thw"]
    # The grid counts patches; the encoder merges neighbouring ones into a token.
    return int(grid.prod()) // image_processor.merge_size**2


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Calls an autoencoder's ``function`` on as many rows at a time as fit its memory, which grows with their pixels.

    Args:
        function: encodes or decodes.
        rows: images ``[N, 3, H, W]`` or their latents.
        size: height and width of the images.
    """
    at_once = max(1, min(MAX_IMAGES, MAX_PIXELS // (size[0] * size[1])))
    return torch.cat([function(part) for part in rows.split(at_once)])


def prompt_chunks(prompts: Sequence[str], max_sequence_length: int) -> list[list[str]]:
    """Splits prompts into parts that a text encoder takes at once."""
    # By their tokens: a text encoder that is a language model makes logits of every token.
    at_once = max(1, min(MAX_PROMPTS, MAX_TOKENS // max_sequence_length))
    return [list(prompts[i : i + at_once]) for i in range(0, len(prompts), at_once)]


def embedded_guidance(pipeline, wanted: float | None) -> float | None:
    """Returns the guidance scale embedded in every pass: ``wanted``, by default a stock call's; None without embedding.

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
    """Returns the error about a guidance embedding that is wanted of a family without one."""
    return CloraError(
        f"sampler.guidance_embedding = {wanted}: the transformer of {type(pipeline).__name__} has no guidance "
        "embedding; remove it, or set sampler.guidance for the pass with the empty prompt"
    )


def guidance_rows(guidance: float | None, like: Tensor) -> Tensor | None:
    """Returns an embedded guidance scale as a pipeline hands it to its transformer: fp32 ``[B]``."""
    return None if guidance is None else torch.full((len(like),), guidance, device=like.device, dtype=torch.float32)


def stock_schedule(scheduler, steps: int, mu: float) -> Tensor:
    """Returns the noise levels ``[steps + 1]``, the last 0, of a pipeline's call with ``steps`` steps.

    Args:
        scheduler: the pipeline's; it is left as it is.
        steps: number of steps.
        mu: the time shift that the pipeline passes for its image size, used if the scheduler shifts dynamically.
    """
    copy = type(scheduler).from_config(scheduler.config)
    if copy.config.get("use_flow_sigmas"):
        copy.set_timesteps(steps, mu=mu)
    else:
        # Pipelines pass their own levels 1, ..., 1 / steps, which the scheduler then shifts.
        copy.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return copy.sigmas


def timestep(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns noise levels as a pipeline hands them to its transformer: 1000 sigma rounded to ``dtype``, over 1000."""
    # bfloat16 has 8 significant bits: below 1000, rounding moves 1000 sigma by up to 2, and training must see the same
    # levels as sampling. In fp32 the round trip changes only the last bit.
    if dtype == torch.float32:
        return sigma.to(dtype)
    return (1000 * sigma).to(dtype) / 1000
