"""FLUX.1 Kontext: one reference, its tokens after the latents', told apart by the first of three position ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clora.devices import send
from clora.models.common import (
    check_lengths,
    check_limit,
    check_size,
    embedded_guidance,
    guidance_rows,
    in_chunks,
    linear_mu,
    module_of,
    only_image,
    prompt_chunks,
    stock_schedule,
    timestep,
    to_pil,
)
from clora.models.conditioning import Conditioning, Shapes, Text

MAX_SEQUENCE_LENGTH = 512  # the pipeline refuses more


class FluxKontextAdapter:
    """FLUX.1 Kontext: the guidance scale is embedded; a pass with the empty prompt is optional (see `ModelAdapter`).

    A stock call makes pictures of about ``max_area`` pixels whatever size is asked for, so the student's call names it.
    It resizes the picture to edit to the preferred resolution next in aspect, whatever its size, and so does this class.

    Args:
        pipeline: a ``FluxKontextPipeline``.
        size: ``(height, width)`` of the results in pixels, multiples of the pipeline's patch size.
        max_sequence_length: T5 tokens per prompt; a longer prompt is an error. The CLIP encoder, which gives the pooled
            embedding alone, reads the first 77 tokens: of a longer prompt the pipeline itself warns.
        guidance_embedding: guidance scale embedded in every pass; None for that of a stock call.

    Raises:
        CloraError: the size does not fit the patch size, the sequence is too long for the pipeline, or the transformer
            has no guidance embedding.
    """

    text_sees_image = False
    image_tokens = 0
    default_guidance = 0.0

    def __init__(
        self, pipeline, size: tuple[int, int], max_sequence_length: int, guidance_embedding: float | None = None
    ):
        self._multiple = pipeline.vae_scale_factor * 2
        check_size(size, self._multiple)
        check_limit(pipeline, max_sequence_length, MAX_SEQUENCE_LENGTH)
        self.pipeline = pipeline
        self.size = size
        self.max_sequence_length = max_sequence_length
        self.guidance_embedding = embedded_guidance(pipeline, guidance_embedding)
        self._module = module_of(pipeline)
        self._channels = pipeline.transformer.config.in_channels // 4
        self._grid = (size[0] // self._multiple, size[1] // self._multiple)
        self.latent_shape = (self._grid[0] * self._grid[1], 4 * self._channels)
        self.source_shapes = self._shapes_of(self._fitting(torch.zeros(1, 3, *size)))
        self._text_ids = torch.zeros(max_sequence_length, 3)
        self._own_image_ids = self._image_ids(self.source_shapes)

    @property
    def latent_dtype(self) -> torch.dtype:
        """See `ModelAdapter`."""
        return self.pipeline.transformer.dtype

    @property
    def student_call(self) -> dict[str, float]:
        """See `ModelAdapter`."""
        guidance = {} if self.guidance_embedding is None else {"guidance_scale": self.guidance_embedding}
        return {**guidance, "max_area": self.size[0] * self.size[1]}

    def _fitting(self, images: Tensor) -> tuple[int, int]:
        """Height and width to which the pipeline resizes such references."""
        height, width = self.pipeline.image_processor.get_default_height_width(images)  # whole patches
        aspect = width / height
        preferred = self._module.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(aspect - width / height), width, height) for width, height in preferred)
        return height // self._multiple * self._multiple, width // self._multiple * self._multiple

    def _shapes_of(self, size: tuple[int, int]) -> Shapes:
        return ((size[0] // self._multiple, size[1] // self._multiple),)

    def _image_ids(self, shapes: Shapes) -> Tensor:
        """Position ids of the latents and of the reference after them, ``[T + S, 3]``."""
        ids = [
            self.pipeline._prepare_latent_image_ids(1, *grid, torch.device("cpu"), torch.float32)
            for grid in (self._grid, *shapes)
        ]
        for references in ids[1:]:
            references[:, 0] = 1
        return torch.cat(ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`."""
        check_lengths(self, prompts)
        chunks = prompt_chunks(prompts, self.max_sequence_length)
        return Text.cat([self._encode_prompts(chunk) for chunk in chunks])

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        tokenizer = self.pipeline.tokenizer_2
        return len(tokenizer(self.pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids)

    def _encode_prompts(self, prompts: list[str]) -> Text:
        embeds, pooled, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)
        return Text(embeds.cpu(), pooled=pooled.cpu())

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`. Raises CloraError for more than one image: the pipeline takes one."""
        sources = only_image(self.pipeline, references)
        size = self._fitting(sources)
        images = torch.cat([self._resize(image, size) for image in sources])
        return self.encode_images(images), self._shapes_of(size)

    def _resize(self, image: Tensor, size: tuple[int, int]) -> Tensor:
        processor = self.pipeline.image_processor
        return processor.preprocess(processor.resize(to_pil(image), *size), *size)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ModelAdapter.encode_images`; any size that is a multiple of the patch size."""
        vae = self.pipeline.vae
        return in_chunks(self._encode, images.to(vae.device, vae.dtype), images.shape[-2:]).float().cpu()

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.pipeline._encode_vae_image(images, generator=None)
        return self.pipeline._pack_latents(latents, *latents.shape)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ModelAdapter.decode`."""
        vae = self.pipeline.vae
        return in_chunks(self._decode, latents.to(vae.device, vae.dtype), self.size).float().cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = self.pipeline._unpack_latents(latents, *self.size, self.pipeline.vae_scale_factor)
        return vae.decode(grid / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    def teacher_schedule(self, steps: int) -> Tensor:
        """See `ModelAdapter.teacher_schedule`."""
        return stock_schedule(self.pipeline.scheduler, steps, linear_mu(self.pipeline, self.latent_shape[0]))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        transformer, text, shapes = self.pipeline.transformer, conditioning.text, conditioning.shapes
        image_ids = self._own_image_ids if shapes in (None, self.source_shapes) else self._image_ids(shapes)
        output = transformer(
            hidden_states=torch.cat([x, conditioning.source.to(x)], dim=1).to(transformer.dtype),
            encoder_hidden_states=text.embeds.to(transformer.dtype),
            pooled_projections=text.pooled.to(transformer.dtype),
            timestep=timestep(sigma, transformer.dtype),
            guidance=guidance_rows(self.guidance_embedding, x),
            img_ids=send(image_ids, x.device),
            txt_ids=send(self._text_ids, x.device),
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]
