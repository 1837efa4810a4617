"""Qwen-Image-Edit: a vision-language model reads the prompt with the images; their latents follow the noisy ones.

A block has 14 linear layers, all LoRA targets by default (`linear_names`), as in the paper: eight of the attention,
four of the two MLPs, and the modulations ``img_mod.1`` and ``txt_mod.1``. Usual trainers leave some out: diffusers and
LightX2V train ``to_q, to_k, to_v, to_out.0`` alone, musubi-tuner no modulation, DiffSynth-Studio no ``net.0.proj``.
Four of the last block (``add_q_proj``, ``to_add_out``, ``txt_mlp``) change nothing: no layer reads the text after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clora.errors import CloraError
from clora.models.common import (
    attention_mask,
    check_lengths,
    check_limit,
    check_size,
    in_chunks,
    linear_mu,
    module_of,
    num_seen_tokens,
    only_image,
    stock_schedule,
    timestep,
    to_pil,
)
from clora.models.conditioning import Conditioning, Shapes, Text


class QwenImageEditPlusAdapter:
    """Qwen-Image-Edit-2509 and 2511: one or several images to edit (see `ModelAdapter`).

    The pipeline scales guided velocities to the norm of the conditional ones: ``objective.norm_rescale`` does the same.

    Args:
        pipeline: a ``QwenImageEditPlusPipeline``.
        size: ``(height, width)`` of the results in pixels, multiples of the pipeline's patch size.
        max_sequence_length: tokens of a prompt, those of template and images not counted. The pipeline cuts none; it
            refuses a limit above its own.

    Raises:
        CloraError: the size does not fit the patch size, or the limit is above the pipeline's.
    """

    text_sees_image = True
    _patch = 2  # latent pixels that a token has on each side
    guidance_embedding = None
    default_guidance = 3.0  # w = true_cfg_scale - 1, of the pipeline's default 4.0; the paper has w = 4

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        check_size(size, pipeline.vae_scale_factor * 2)
        check_limit(pipeline, max_sequence_length, getattr(pipeline, "tokenizer_max_length", max_sequence_length))
        self.pipeline = pipeline
        self.size = size
        self.max_sequence_length = max_sequence_length
        self.student_call = {"true_cfg_scale": 1.0}
        self._module = module_of(pipeline)
        self._token = pipeline.vae_scale_factor * self._patch  # its pixels
        self._grid = self._grid_of(*size)
        self.latent_shape = (self._grid[0] * self._grid[1], pipeline.transformer.config.in_channels)
        self.source_shapes: Shapes = (self._grid_of(*self._source_size(*size)),)

    @property
    def latent_dtype(self) -> torch.dtype:
        """See `ModelAdapter`."""
        return self.pipeline.transformer.dtype

    @property
    def image_tokens(self) -> int:
        """See `ModelAdapter`."""
        return num_seen_tokens(self.pipeline.processor.image_processor, *self._seen_size(*self.size))

    def _grid_of(self, height: int, width: int) -> tuple[int, int]:
        return height // self._token, width // self._token

    def _source_size(self, height: int, width: int) -> tuple[int, int]:
        """Size in pixels in which the VAE sees an image of this size."""
        return self._scaled(height, width, self._module.VAE_IMAGE_SIZE)

    def _seen_size(self, height: int, width: int) -> tuple[int, int]:
        """Size in pixels in which the text encoder sees an image of this size."""
        return self._scaled(height, width, self._module.CONDITION_IMAGE_SIZE)

    def _scaled(self, height: int, width: int, area: int) -> tuple[int, int]:
        width, height = self._module.calculate_dimensions(area, width / height)[:2]
        return height, width

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`. Raises ValueError without references."""
        if not references:
            raise ValueError("expected the images that the prompts are about, which are encoded with them; found none")
        check_lengths(self, prompts)
        samples = zip(prompts, zip(*references, strict=True), strict=True)
        return Text.cat([self._encode_prompt(prompt, [self._seen(i) for i in images]) for prompt, images in samples])

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`; those of the template and of images are not counted."""
        return len(self.pipeline.processor.tokenizer(prompt)["input_ids"])

    def _seen(self, image: Tensor) -> Image.Image:
        """An image as the text encoder sees it."""
        return self.pipeline.image_processor.resize(self._to_pil(image), *self._seen_size(*image.shape[-2:]))

    def _to_pil(self, image: Tensor) -> Image.Image:
        return to_pil(image)

    def _encode_prompt(self, prompt: str, images: list[Image.Image]) -> Text:
        """One prompt: the pipeline takes one set of images for all the prompts of a call."""
        device = self.pipeline.text_encoder.device
        return Text(self.pipeline.encode_prompt(prompt, self._pipeline_images(images), device)[0].cpu())

    def _pipeline_images(self, images: list[Image.Image]):
        return images

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`. Every image is resized to about 1024 x 1024 pixels, as the pipeline does."""
        fitted = [torch.cat([self._fit(image) for image in images]) for images in references]
        shapes = tuple(self._grid_of(*images.shape[-2:]) for images in fitted)
        return torch.cat([self.encode_images(images) for images in fitted], dim=1), shapes

    def _fit(self, image: Tensor) -> Tensor:
        return self.pipeline.image_processor.preprocess(self._to_pil(image), *self._source_size(*image.shape[-2:]))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ModelAdapter.encode_images`; any size that is a multiple of the patch size."""
        return in_chunks(self._encode, images, images.shape[-2:])

    def _encode(self, images: Tensor) -> Tensor:
        frames = images.unsqueeze(2).to(self.pipeline.vae.device, self.pipeline.vae.dtype)
        latents = self.pipeline._encode_vae_image(frames, generator=None)
        count, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, count, channels, height, width).cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ModelAdapter.decode`."""
        return in_chunks(self._decode, latents, self.size)

    def _decode(self, latents: Tensor) -> Tensor:
        pipeline, vae = self.pipeline, self.pipeline.vae
        grid = pipeline._unpack_latents(latents, *self.size, pipeline.vae_scale_factor).to(vae.device, vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(grid)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(grid * std + mean, return_dict=False)[0][:, :, 0].cpu()

    def teacher_schedule(self, steps: int) -> Tensor:
        """See `ModelAdapter.teacher_schedule`."""
        return stock_schedule(self.pipeline.scheduler, steps, linear_mu(self.pipeline, self.latent_shape[0]))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        transformer, text = self.pipeline.transformer, conditioning.text
        shapes = [(1, *shape) for shape in (self._grid, *(conditioning.shapes or self.source_shapes))]
        output = transformer(
            hidden_states=torch.cat([x, conditioning.source.to(x)], dim=1).to(transformer.dtype),
            encoder_hidden_states=text.embeds.to(transformer.dtype),
            encoder_hidden_states_mask=attention_mask(text, x.device),
            timestep=timestep(sigma, transformer.dtype),
            img_shapes=[shapes] * len(x),
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


class QwenImageEditAdapter(QwenImageEditPlusAdapter):
    """The first Qwen-Image-Edit: one image, which text encoder and VAE see in the same size (see `ModelAdapter`)."""

    def _source_size(self, height: int, width: int) -> tuple[int, int]:
        return self._scaled(height, width, 1024 * 1024)  # a literal in the pipeline's call

    _seen_size = _source_size

    def _pipeline_images(self, images: list[Image.Image]):
        return only_image(self.pipeline, images)

    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`. Raises CloraError for several images per sample."""
        return super().encode_sources([only_image(self.pipeline, references)])


RESOLUTION = 1024  # the pipeline's default output_resolution: the side of a square image to edit


class QwenImage21Adapter(QwenImageEditPlusAdapter):
    """Qwen-Image 2.1 with one or several images to edit (see `ModelAdapter`).

    A block has seven linear layers: four of the attention and ``img_mlp.proj``, ``img_mlp.gate_layer``, ``img_mlp.out``.
    The pipeline works on RGBA; here images are opaque, and the alpha of results is dropped.

    In `Text.embeds` the images' places are zero: the transformer puts their latents there.

    Raises:
        CloraError: the pipeline has noise levels of its own, which calls would use instead of the student's.
    """

    _patch = 1
    default_guidance = 0.0  # the model is meant to be sampled without guidance; with it, nothing is rescaled

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        if pipeline.config.sample_sigmas is not None:
            raise CloraError(
                "expected a Qwen-Image 2.1 pipeline without sample_sigmas, found noise levels that its calls use whatever "
                "the number of steps; remove sample_sigmas from its model_index.json"
            )
        super().__init__(pipeline, size, max_sequence_length)

    def _source_size(self, height: int, width: int) -> tuple[int, int]:
        return self._scaled(height, width, RESOLUTION * RESOLUTION)

    _seen_size = _source_size

    def _to_pil(self, image: Tensor) -> Image.Image:
        return super()._to_pil(image).convert("RGBA")

    def _encode_prompt(self, prompt: str, images: list[Image.Image]) -> Text:
        embeds, _, places = self.pipeline.encode_prompt([prompt], images, self.pipeline.text_encoder.device)
        return Text(embeds.masked_fill(places[..., None], 0).cpu())

    def _encode(self, images: Tensor) -> Tensor:
        opaque = functional.pad(images, (0, 0, 0, 0, 0, 4 - images.shape[1]), value=1.0)
        return super()._encode(opaque)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents)[:, :3]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        transformer, text, num_tokens = self.pipeline.transformer, conditioning.text, x.shape[1]
        shapes = [(1, *shape) for shape in (*(conditioning.shapes or self.source_shapes), self._grid)]
        places, mask = (text.embeds[:1] == 0).all(-1), attention_mask(text, x.device)
        if mask is not None:
            places = places & mask[:1]
        with _positions_without_padding(transformer.pos_embed, mask, num_tokens):
            output = transformer(
                hidden_states=torch.cat([conditioning.source.to(x), x], dim=1).to(transformer.dtype),
                encoder_hidden_states=text.embeds.to(transformer.dtype),
                encoder_hidden_states_mask=mask,
                timestep=timestep(sigma, transformer.dtype),
                img_shapes=[shapes] * len(x),
                img_mask=functional.pad(places, (0, num_tokens // 4), value=True).expand(len(x), -1),
                return_dict=False,
            )[0]
        return output[:, -num_tokens:]


@contextmanager
def _positions_without_padding(rope, mask: Tensor | None, num_tokens: int) -> Iterator[None]:
    """Inside, the result of each row stands right after its own text, as in a call with this row alone.

    The transformer has one list of positions for the batch, in which the padding of shorter texts counts.

    Args:
        rope: the transformer's position embedding.
        mask: ``[B, L]``, false at padding.
        num_tokens: tokens of the result, which come last.
    """
    if mask is None:
        yield
        return
    padding = (~mask).sum(1)

    def move_back(module, arguments, freqs: Tensor) -> _RowFreqs:
        back = module.freqs[0][padding].conj()[:, None]  # of the first axis, along which the sequence runs
        rows = freqs.repeat(len(padding), 1, 1)
        rows[:, -num_tokens:, : back.shape[-1]] *= back
        return _RowFreqs(rows.unsqueeze(2))

    handle = rope.register_forward_hook(move_back)
    try:
        yield
    finally:
        handle.remove()


class _RowFreqs:
    """Rotations ``[B, S, 1, D]``, own for each row, where the transformer has ``[S, D]`` and makes room for the heads."""

    def __init__(self, freqs: Tensor):
        self._freqs = freqs

    def unsqueeze(self, dim: int) -> Tensor:
        return self._freqs
