"""FLUX.1 Kontext: the tokens of one reference follow those of the latents; the first of three position ids differs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from clora.devices import send
from clora.models.common import (
    FamilyAdapter,
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
        self._image_ids = cache(self._make_image_ids)

    def _preferred_size(self, images: Tensor) -> tuple[int, int]:
        """Returns the height and width to which the pipeline resizes such references."""
        height, width = self.pipeline.image_processor.get_default_height_width(images)  # whole patches
        # Of the sizes that the model was trained with, the nearest in aspect; on a tie the smallest width, as in the
        # pipeline.
        aspect = width / height
        preferred = self._module.PREFERRED_KONTEXT_RESOLUTIONS
        _, width, height = min((abs(aspect - width / height), width, height) for width, height in preferred)
        return height // self._token * self._token, width // self._token * self._token

    def _make_image_ids(self, shapes: Shapes) -> Tensor:
        """Makes the position ids of the latents and of the reference after them, ``[T + S, 3]``."""
        ids = [
            self.pipeline._prepare_latent_image_ids(1, *grid, torch.device("cpu"), torch.float32)
            for grid in (self._grid, *shapes)
        ]
        # Both grids count from zero in the other two ids; only the first is 0 for the latents and 1 for the reference.
        for references in ids[1:]:
            references[:, 0] = 1
        return torch.cat(ids)

    def _encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None) -> Iterator[Text]:
        length = self.max_sequence_length
        # T5's embeddings [N, L, D], padded and read without a mask, and CLIP's pooled ones [N, P].
        for chunk in prompt_chunks(prompts, length):
            embeds, pooled, _ = self.pipeline.encode_prompt(chunk, max_sequence_length=length)
            yield Text(embeds.cpu(), pooled=pooled.cpu())

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        tokenizer = self.pipeline.tokenizer_2
        return len(tokenizer(self.pipeline.maybe_convert_prompt(prompt, tokenizer)).input_ids)

    def _fit(self, images: Tensor) -> Tensor:
        processor = self.pipeline.image_processor
        size = self._preferred_size(images)
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
        return self._predict(
            x,
            sigma,
            conditioning,
            pooled_projections=conditioning.text.pooled.to(self.pipeline.transformer.dtype),
            guidance=guidance_rows(self.guidance_embedding, x),
            img_ids=send(self._image_ids(conditioning.shapes or self.source_shapes), x.device),
            txt_ids=send(self._text_ids, x.device),
        )
