"""FLUX.1 Kontext: one reference, its tokens after the latents', told apart by the first of three position ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clora.devices import send
from clora.models.common import (
    FamilyAdapter,
    check_lengths,
    check_limit,
    embedded_guidance,
    guidance_rows,
    prompt_chunks,
    to_pil,
)
from clora.models.conditioning import Conditioning, Shapes, Text

MAX_SEQUENCE_LENGTH = 512  # the pipeline refuses more


class FluxKontextAdapter(FamilyAdapter):
    """FLUX.1 Kontext: the guidance scale is embedded; a pass with the empty prompt is optional (see `ModelAdapter`).

    A stock call makes pictures of about ``max_area`` pixels whatever size is asked for, so the student's call names it.
    It resizes the picture to edit to the preferred resolution next in aspect, whatever its size, and so does this class.

    Args:
        pipeline: a ``FluxKontextPipeline``.
        size: ``(height, width)`` of the results in pixels, multiples of the pipeline's patch size.
        max_sequence_length: T5 tokens per prompt; a longer prompt is an error. The CLIP encoder, which only makes the
            pooled embedding, reads the first 77 tokens: of a longer prompt the pipeline itself warns.
        guidance_embedding: guidance scale embedded in every pass; None for that of a stock call.

    Raises:
        CloraError: the size does not fit the patch size, the sequence is too long for the pipeline, or the transformer
            has no guidance embedding.
    """

    _takes_one_image = True

    def __init__(
        self, pipeline, size: tuple[int, int], max_sequence_length: int, guidance_embedding: float | None = None
    ):
        super().__init__(pipeline, size, max_sequence_length)
        check_limit(pipeline, max_sequence_length, MAX_SEQUENCE_LENGTH)
        self.guidance_embedding = embedded_guidance(pipeline, guidance_embedding)
        guidance = {} if self.guidance_embedding is None else {"guidance_scale": self.guidance_embedding}
        self.student_call = {**guidance, "max_area": size[0] * size[1]}
        self.source_shapes = (self._grid_of(*self._preferred_size(torch.zeros(1, 3, *size))),)
        self._text_ids = torch.zeros(max_sequence_length, 3)
        self._own_image_ids = self._image_ids(self.source_shapes)

    def _preferred_size(self, images: Tensor) -> tuple[int, int]:
        """Height and width to which the pipeline resizes such references."""
        height, width = self.pipeline.image_processor.get_default_height_width(images)  # whole patches
        aspect = width / height
        preferred = self._module.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(aspect - width / height), width, height) for width, height in preferred)
        return height // self._token * self._token, width // self._token * self._token

    def _image_ids(self, shapes: Shapes) -> Tensor:
        """Position ids of the latents and of the reference after them, ``[T + S, 3]``."""
        ids = [
            self.pipeline._prepare_latent_image_ids(1, *grid, torch.device("cpu"), torch.float32)
            for grid in (self._grid, *shapes)
        ]
        # Both grids count from zero in the other two ids; only the first is 0 for the latents and 1 for the reference.
        for references in ids[1:]:
            references[:, 0] = 1
        return torch.cat(ids)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`."""
        check_lengths(self, prompts)
        length, parts = self.max_sequence_length, []
        for chunk in prompt_chunks(prompts, length):
            embeds, pooled, _ = self.pipeline.encode_prompt(chunk, max_sequence_length=length)
            parts.append(Text(embeds.cpu(), pooled=pooled.cpu()))
        return Text.cat(parts)

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        tokenizer = self.pipeline.tokenizer_2
        return len(tokenizer(self.pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids)

    def _fit(self, images: Tensor) -> Tensor:
        processor, size = self.pipeline.image_processor, self._preferred_size(images)
        return torch.cat([processor.preprocess(processor.resize(to_pil(image), *size), *size) for image in images])

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.pipeline._encode_vae_image(images.to(self.pipeline.vae.dtype), generator=None)
        return self.pipeline._pack_latents(latents, *latents.shape).float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = self.pipeline._unpack_latents(latents.to(vae.dtype), *self.size, self.pipeline.vae_scale_factor)
        grid = grid / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(grid, return_dict=False)[0].float()

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        shapes = conditioning.shapes
        image_ids = self._own_image_ids if shapes in (None, self.source_shapes) else self._image_ids(shapes)
        return self._predict(
            x,
            sigma,
            conditioning,
            pooled_projections=conditioning.text.pooled.to(self.pipeline.transformer.dtype),
            guidance=guidance_rows(self.guidance_embedding, x),
            img_ids=send(image_ids, x.device),
            txt_ids=send(self._text_ids, x.device),
        )
