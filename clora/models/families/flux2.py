"""FLUX.2: the tokens of text and references join those of the latents; 4-D position ids separate them.

A prompt is padded to ``max_sequence_length``, and the transformer reads the padding as the pipeline does, without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from clora.devices import send
from clora.errors import CloraError
from clora.models.common import MEGAPIXEL, FamilyAdapter, embedded_guidance, guidance_rows, prompt_chunks
from clora.models.conditioning import Conditioning, Shapes, Text


class _Flux2(FamilyAdapter):
    """The common part of the FLUX.2 pipelines; see `ModelAdapter`."""

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        super().__init__(pipeline, size, max_sequence_length)
        self.source_shapes = (self._grid_of(*self._fit(torch.zeros(1, 3, *size)).shape[-2:]),)
        self._text_ids = pipeline._prepare_text_ids(torch.zeros(1, max_sequence_length, 1))[0]
        self._image_ids = cache(self._make_image_ids)

    def _make_image_ids(self, shapes: Shapes) -> Tensor:
        """Makes the position ids of the latents and of the references after them, ``[T + S, 4]``."""
        # The first of the four ids is 0 for the latents, 10 for the first reference, 20 for the next.
        latents = self.pipeline._prepare_latent_ids(torch.zeros(1, 1, *self._grid))[0]
        references = self.pipeline._prepare_image_ids([torch.zeros(1, 1, *shape) for shape in shapes])[0]
        return torch.cat([latents, references])

    def _encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None) -> Iterator[Text]:
        length = self.max_sequence_length
        for chunk in prompt_chunks(prompts, length):
            yield Text(self.pipeline.encode_prompt(chunk, max_sequence_length=length)[0].cpu())

    def _fit(self, images: Tensor) -> Tensor:
        """Scales images of more than 1024 x 1024 pixels down and crops to whole patches, as the pipeline does."""
        height, width = images.shape[-2:]
        if height * width <= MEGAPIXEL and height % self._token == width % self._token == 0:
            return images
        return torch.cat([self._cropped(self._reduced(image, MEGAPIXEL)) for image in images])

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.pipeline._encode_vae_image(images.to(self.pipeline.vae.dtype), generator=None)
        return self.pipeline._pack_latents(latents).float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        # [N, T, C] to [N, C, H, W], where the C channels are those of 2 x 2 latent pixels. Unlike FLUX.1, whose latents
        # have one scale and one shift, each of these channels has its own: the running statistics of a batch norm.
        # `_unpatchify_latents` then puts the pixels back side by side.
        grid = latents.to(vae.dtype).transpose(1, 2).reshape(len(latents), -1, *self._grid)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(grid)
        grid = grid * std + vae.bn.running_mean.view(1, -1, 1, 1).to(grid)
        return vae.decode(self.pipeline._unpatchify_latents(grid), return_dict=False)[0].float()

    def _time_shift(self, steps: int) -> float:
        # Unlike the other families, the pipeline shifts less where there are many steps.
        return self._module.compute_empirical_mu(self.latent_shape[0], steps)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        # The transformer of [klein] has no guidance embedding; it gets None, as from its pipeline.
        return self._predict(
            x,
            sigma,
            conditioning,
            img_ids=send(self._image_ids(conditioning.shapes or self.source_shapes), x.device),
            txt_ids=send(self._text_ids, x.device),
            guidance=guidance_rows(self.guidance_embedding, x),
        )


class Flux2KleinAdapter(_Flux2):
    """FLUX.2 [klein]: guidance by a second pass with the empty prompt, no guidance embedding (see `ModelAdapter`).

    Args:
        pipeline: a ``Flux2KleinPipeline`` that is not distilled.
        size: ``(height, width)`` of the images in pixels, multiples of the pipeline's patch size.
        max_sequence_length: text tokens per prompt; a longer prompt is an error, never a silent cut.

    Raises:
        CloraError: the pipeline is distilled (it has no guidance, so it cannot be a teacher's base), or the size
            does not fit the patch size.
    """

    default_guidance = 4.0  # the paper's
    stock_guidance = 3.0  # w = guidance_scale - 1, of the pipeline's default 4.0

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        if pipeline.config.is_distilled:
            raise CloraError(
                "expected a base FLUX.2 [klein] pipeline, found a distilled one (is_distilled = true), which has no "
                "guidance and cannot be the teachers' base; use the undistilled (base) model"
            )
        super().__init__(pipeline, size, max_sequence_length)

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        messages = [{"role": "user", "content": prompt}]
        tokenizer = self.pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(tokenizer(text)["input_ids"])


class Flux2Adapter(_Flux2):
    """FLUX.2 [dev]: the guidance scale is embedded, a stock call has no pass with the empty prompt (see `ModelAdapter`).

    Args:
        pipeline: a ``Flux2Pipeline``.
        size: ``(height, width)`` of the images in pixels, multiples of the pipeline's patch size.
        max_sequence_length: text tokens per prompt, the system message included; a longer prompt is an error.
        guidance_embedding: guidance scale embedded in every pass; None for that of a stock call.

    Raises:
        CloraError: the size does not fit the patch size, or the transformer has no guidance embedding.
    """

    def __init__(
        self, pipeline, size: tuple[int, int], max_sequence_length: int, guidance_embedding: float | None = None
    ):
        super().__init__(pipeline, size, max_sequence_length)
        self.guidance_embedding = embedded_guidance(pipeline, guidance_embedding)
        if self.guidance_embedding is not None:
            self.student_call = {"guidance_scale": self.guidance_embedding}

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        messages = self._module.format_input(prompts=[prompt], system_message=self.pipeline.system_message)
        template = self.pipeline.tokenizer.apply_chat_template
        tokens = template(messages, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt")
        return tokens["input_ids"].shape[1]
