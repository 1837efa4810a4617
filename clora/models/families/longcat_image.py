"""LongCat-Image-Edit: the picture is seen by the text encoder too; its latents join those of the result by 3-D ids."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from PIL import Image
from torch import Tensor

from clora.devices import send
from clora.errors import CloraError
from clora.models.common import (
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

AREA = 1024 * 1024  # pixels that the pipeline brings every picture to, keeping its proportions
LATENT_CHANNELS = 16


class LongCatImageEditAdapter:
    """LongCat-Image-Edit: one picture, whose proportions alone decide the size of the result.

    Args:
        pipeline: a ``LongCatImageEditPipeline``. It has no method that loads a LoRA; its transformer has
            ``load_lora_adapter(folder, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")``.
        size: ``(height, width)`` of the images in pixels, one that a stock call makes.
        max_sequence_length: text tokens of a prompt, at most the pipeline's ``tokenizer_max_length``, to which every
            prompt is padded; a longer prompt is an error.

    Raises:
        CloraError: no stock call makes that size, or takes so many tokens.
    """

    text_sees_image = True
    default_guidance = 3.5
    guidance_embedding = None

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        multiple = pipeline.vae_scale_factor * 2
        check_size(size, multiple)
        self.pipeline = pipeline
        if self._stock_size(size) != size:
            raise CloraError(
                f"expected an image size that LongCat-Image-Edit makes, about a megapixel; found {size[0]}x{size[1]}, "
                "for pictures of these proportions it makes {}x{}".format(*self._stock_size(size))
            )
        check_limit(pipeline, max_sequence_length, pipeline.tokenizer_max_length)
        self.size = size
        self.max_sequence_length = max_sequence_length
        self.student_call = {"guidance_scale": 1.0}
        self._grid = (size[0] // multiple, size[1] // multiple)
        self.latent_shape = (prod(self._grid), LATENT_CHANNELS * 4)
        self.source_shapes = (self._grid,)

    @property
    def latent_dtype(self) -> torch.dtype:
        """See `ModelAdapter`."""
        return self.pipeline.transformer.dtype

    @property
    def image_tokens(self) -> int:
        """See `ModelAdapter`. The pipeline pads every prompt to its own limit."""
        height, width = self.size
        seen = num_seen_tokens(self.pipeline.text_processor.image_processor, height // 2, width // 2)
        return seen + self.pipeline.tokenizer_max_length - self.max_sequence_length

    def _stock_size(self, size: tuple[int, int]) -> tuple[int, int]:
        width, height = module_of(self.pipeline).calculate_dimensions(AREA, size[1] / size[0])
        return height, width

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`; one by one, as the pipeline takes them."""
        check_lengths(self, prompts)
        images = only_image(self.pipeline, references)
        return Text.cat([self._encode_prompt(*pair) for pair in zip(prompts, images, strict=True)])

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`. Words in quotation marks are encoded letter by letter."""
        parts = module_of(self.pipeline).split_quotation(prompt)
        pieces = [piece for part, quoted in parts for piece in (part if quoted else [part])]
        return sum(len(self.pipeline.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)

    def _encode_prompt(self, prompt: str, image: Tensor) -> Text:
        height, width = self.size
        seen = self.pipeline.image_processor.resize(self._fit(image), height // 2, width // 2)
        return Text(self.pipeline.encode_prompt([prompt], seen)[0].cpu())

    def _fit(self, image: Tensor) -> Image.Image:
        """A picture in the size that the pipeline brings it to."""
        image = to_pil(image)
        size = self._stock_size((image.height, image.width))
        if size != self.size:
            raise CloraError(
                f"expected a picture of the proportions of {self.size[0]}x{self.size[1]}, found "
                f"{image.height}x{image.width}, of which LongCat-Image-Edit makes {size[0]}x{size[1]}"
            )
        return self.pipeline.image_processor.resize(image, *size)

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`; one picture for each sample."""
        preprocess = self.pipeline.image_processor.preprocess
        fitted = [preprocess(self._fit(image), *self.size) for image in only_image(self.pipeline, references)]
        return self.encode_images(torch.cat(fitted)), self.source_shapes

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ModelAdapter.encode_images`."""
        vae = self.pipeline.vae
        return in_chunks(self._encode, images.to(vae.device, vae.dtype), images.shape[-2:]).cpu()

    def _encode(self, images: Tensor) -> Tensor:
        height, width = (2 * side for side in self._grid)
        latents = self.pipeline._encode_vae_image(images, generator=None)
        return self.pipeline._pack_latents(latents, len(images), LATENT_CHANNELS, height, width)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ModelAdapter.decode`."""
        return in_chunks(self._decode, latents.to(self.pipeline.vae.device), self.size).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = self.pipeline._unpack_latents(latents, *self.size, self.pipeline.vae_scale_factor)
        grid = grid / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(grid.to(vae.dtype), return_dict=False)[0]

    def teacher_schedule(self, steps: int) -> Tensor:
        """See `ModelAdapter.teacher_schedule`."""
        return stock_schedule(self.pipeline.scheduler, steps, linear_mu(self.pipeline, self.latent_shape[0]))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        transformer = self.pipeline.transformer
        text = conditioning.text.embeds.to(transformer.dtype)
        text_ids, image_ids = self._position_ids(text.shape[1])
        output = transformer(
            hidden_states=torch.cat([x, conditioning.source.to(x)], dim=1).to(transformer.dtype),
            encoder_hidden_states=text,
            timestep=timestep(sigma, transformer.dtype),
            txt_ids=send(text_ids, x.device),
            img_ids=send(image_ids, x.device),
            guidance=None,
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]

    def _position_ids(self, text_length: int) -> tuple[Tensor, Tensor]:
        """Of the text ``[L, 3]``, and of the latents and the source after them ``[2 T, 3]``, which begin at L both."""
        ids, (height, width), start = module_of(self.pipeline).prepare_pos_ids, self._grid, (text_length, text_length)
        latents, source = (ids(m, "image", start, height=height, width=width) for m in (1, 2))
        return ids(0, "text", num_token=text_length), torch.cat([latents, source])
