"""FLUX.2: text and reference tokens join the latent tokens, told apart by 4-D position ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from clora.devices import send
from clora.errors import CloraError
from clora.models.common import (
    check_lengths,
    check_size,
    embedded_guidance,
    guidance_rows,
    in_chunks,
    module_of,
    prompt_chunks,
    stock_schedule,
    timestep,
    to_pil,
)
from clora.models.conditioning import Conditioning, Shapes, Text

MAX_AREA = 1024 * 1024  # pixels of a reference; the pipeline makes larger ones smaller


class _Flux2:
    """What the FLUX.2 pipelines share; see `ModelAdapter`."""

    text_sees_image = False
    image_tokens = 0

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int, guidance_embedding: float | None):
        self._multiple = pipeline.vae_scale_factor * 2
        check_size(size, self._multiple)
        self.pipeline = pipeline
        self.size = size
        self.max_sequence_length = max_sequence_length
        self.guidance_embedding = guidance_embedding
        self.student_call = {"guidance_scale": 1.0 if guidance_embedding is None else guidance_embedding}
        self._grid = (size[0] // self._multiple, size[1] // self._multiple)
        self.latent_shape = (self._grid[0] * self._grid[1], pipeline.transformer.config.in_channels)
        self.source_shapes = self._shapes_of([self._fit(torch.zeros(1, 3, *size))])
        self._text_ids = pipeline._prepare_text_ids(torch.zeros(1, max_sequence_length, 1))[0]
        self._own_image_ids = self._image_ids(self.source_shapes)

    @property
    def latent_dtype(self) -> torch.dtype:
        """See `ModelAdapter`."""
        return self.pipeline.transformer.dtype

    def _shapes_of(self, references: Sequence[Tensor]) -> Shapes:
        sizes = [images.shape[-2:] for images in references]
        return tuple((height // self._multiple, width // self._multiple) for height, width in sizes)

    def _image_ids(self, shapes: Shapes) -> Tensor:
        """Position ids of the latents and of the references after them, ``[T + S, 4]``."""
        latents = self.pipeline._prepare_latent_ids(torch.zeros(1, 1, *self._grid))[0]
        references = self.pipeline._prepare_image_ids([torch.zeros(1, 1, *shape) for shape in shapes])[0]
        return torch.cat([latents, references])

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`."""
        check_lengths(self, prompts)
        length = self.max_sequence_length
        chunks = prompt_chunks(prompts, length)
        return Text(torch.cat([self.pipeline.encode_prompt(c, max_sequence_length=length)[0].cpu() for c in chunks]))

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`. Images of more than 1024 x 1024 pixels are made smaller, as the pipeline does."""
        fitted = [self._fit(images) for images in references]
        return torch.cat([self.encode_images(images) for images in fitted], dim=1), self._shapes_of(fitted)

    def _fit(self, images: Tensor) -> Tensor:
        """Images in the size that the pipeline takes references in."""
        if images.shape[-2] * images.shape[-1] <= MAX_AREA and self._is_whole(images):
            return images
        return torch.cat([self._fit_one(to_pil(image)) for image in images])

    def _is_whole(self, images: Tensor) -> bool:
        return all(side % self._multiple == 0 for side in images.shape[-2:])

    def _fit_one(self, image: Image.Image) -> Tensor:
        processor = self.pipeline.image_processor
        if image.width * image.height > MAX_AREA:
            image = processor._resize_to_target_area(image, MAX_AREA)
        width, height = (side // self._multiple * self._multiple for side in image.size)
        return processor.preprocess(image, height=height, width=width, resize_mode="crop")

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ModelAdapter.encode_images`; any size that is a multiple of the patch size."""
        encode, pack, vae = self.pipeline._encode_vae_image, self.pipeline._pack_latents, self.pipeline.vae
        images = images.to(vae.device, vae.dtype)
        return in_chunks(lambda part: pack(encode(part, generator=None)), images, images.shape[-2:]).float().cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ModelAdapter.decode`."""
        vae = self.pipeline.vae
        return in_chunks(self._decode, latents.to(vae.device, vae.dtype), self.size).float().cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = latents.transpose(1, 2).reshape(len(latents), -1, *self._grid)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(grid)
        grid = grid * std + vae.bn.running_mean.view(1, -1, 1, 1).to(grid)
        return vae.decode(self.pipeline._unpatchify_latents(grid), return_dict=False)[0]

    def teacher_schedule(self, steps: int) -> Tensor:
        """See `ModelAdapter.teacher_schedule`."""
        mu = module_of(self.pipeline).compute_empirical_mu(self.latent_shape[0], steps)
        return stock_schedule(self.pipeline.scheduler, steps, mu)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        transformer = self.pipeline.transformer
        shapes = conditioning.shapes
        image_ids = self._own_image_ids if shapes in (None, self.source_shapes) else self._image_ids(shapes)
        output = transformer(
            hidden_states=torch.cat([x, conditioning.source.to(x)], dim=1).to(transformer.dtype),
            encoder_hidden_states=conditioning.text.embeds.to(transformer.dtype),
            timestep=timestep(sigma, transformer.dtype),
            img_ids=send(image_ids, x.device),
            txt_ids=send(self._text_ids, x.device),
            guidance=guidance_rows(self.guidance_embedding, x),
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


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

    default_guidance = 4.0

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        if pipeline.config.is_distilled:
            raise CloraError(
                "expected a base FLUX.2 [klein] pipeline, found a distilled one (is_distilled = true), which has no "
                "guidance and cannot be the teachers' base; use the undistilled (base) model"
            )
        super().__init__(pipeline, size, max_sequence_length, None)

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

    default_guidance = 0.0

    def __init__(
        self, pipeline, size: tuple[int, int], max_sequence_length: int, guidance_embedding: float | None = None
    ):
        super().__init__(pipeline, size, max_sequence_length, embedded_guidance(pipeline, guidance_embedding))

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        messages = module_of(self.pipeline).format_input(prompts=[prompt], system_message=self.pipeline.system_message)
        template = self.pipeline.tokenizer.apply_chat_template
        tokens = template(messages, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt")
        return tokens["input_ids"].shape[1]
