"""LongCat-Image-Edit: the picture is seen by the text encoder too; its latents join those of the result by 3-D ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from clora.devices import send
from clora.errors import CloraError
from clora.models.common import MEGAPIXEL, FamilyAdapter, check_limit, num_seen_tokens, only_image, to_pil
from clora.models.conditioning import Conditioning, Text


class LongCatImageEditAdapter(FamilyAdapter):
    """LongCat-Image-Edit: one picture, whose proportions decide the size of the result.

    Args:
        pipeline: a ``LongCatImageEditPipeline``. It has no method that loads a LoRA; its transformer has
            ``load_lora_adapter(folder, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")``.
        size: ``(height, width)`` of the images in pixels, one that a stock call makes.
        max_sequence_length: text tokens of a prompt, at most the pipeline's ``tokenizer_max_length``, to which every
            prompt is padded; a longer prompt is an error.

    Raises:
        CloraError: no stock call makes that size, or takes this number of tokens.
    """

    text_sees_image = True
    default_guidance = stock_guidance = 3.5  # w = guidance_scale - 1, of the pipeline's default 4.5
    _takes_one_image = True

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        super().__init__(pipeline, size, max_sequence_length)
        height, width = self._scaled(size, MEGAPIXEL)
        if (height, width) != size:
            raise CloraError(
                f"data.size: expected a size that LongCat-Image-Edit makes, about a megapixel; found {size[0]}x{size[1]}, "
                f"for pictures of these proportions it makes {height}x{width}"
            )
        check_limit(pipeline, max_sequence_length, pipeline.tokenizer_max_length)

    @property
    def image_tokens(self) -> int:
        """See `ModelAdapter`. The pipeline pads every prompt to its own limit."""
        height, width = self.size
        seen = num_seen_tokens(self.pipeline.text_processor.image_processor, height // 2, width // 2)
        return seen + self.pipeline.tokenizer_max_length - self.max_sequence_length

    def _encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None) -> Iterator[Text]:
        height, width = self.size
        # One by one, as the pipeline takes them; the text encoder sees the picture at half its size.
        for prompt, image in zip(prompts, only_image(self.pipeline, references), strict=True):
            seen = self.pipeline.image_processor.resize(self._resized(image), height // 2, width // 2)
            yield Text(self.pipeline.encode_prompt([prompt], seen)[0].cpu())

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`. Words in quotation marks are encoded letter by letter."""
        pieces = []
        for part, is_quoted in self._module.split_quotation(prompt):
            pieces += part if is_quoted else [part]
        return sum(len(self.pipeline.tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)

    def _resized(self, image: Tensor) -> Image.Image:
        """Returns a picture in the size that the pipeline brings it to."""
        image = to_pil(image)
        size = self._scaled((image.height, image.width), MEGAPIXEL)
        if size != self.size:
            raise CloraError(
                f"expected a picture of the proportions of {self.size[0]}x{self.size[1]}, found "
                f"{image.height}x{image.width}, of which LongCat-Image-Edit makes {size[0]}x{size[1]}"
            )
        return self.pipeline.image_processor.resize(image, *size)

    def _fit(self, images: Tensor) -> Tensor:
        preprocess = self.pipeline.image_processor.preprocess
        return torch.cat([preprocess(self._resized(image), *self.size) for image in images])

    def _encode(self, images: Tensor) -> Tensor:
        latents = self.pipeline._encode_vae_image(images.to(self.pipeline.vae.dtype), generator=None)
        return self.pipeline._pack_latents(latents, *latents.shape)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = self.pipeline._unpack_latents(latents, *self.size, self.pipeline.vae_scale_factor)
        # In the latents' dtype, as in the pipeline, which rounds to the autoencoder's only after this.
        grid = grid / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(grid.to(vae.dtype), return_dict=False)[0]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        # The first id of a position is 0 for text, 1 for the latents and 2 for the source. The other two run along the
        # text, and over the grids from L, the text's length, on: [L, 3] and [T + S, 3] with S = T.
        ids = self._module.prepare_pos_ids
        length = conditioning.text.embeds.shape[1]
        height, width = self._grid
        text = ids(0, "text", num_token=length)
        images = [ids(i, "image", (length, length), height=height, width=width) for i in (1, 2)]
        return self._predict(
            x,
            sigma,
            conditioning,
            txt_ids=send(text, x.device),
            img_ids=send(torch.cat(images), x.device),
            guidance=None,
        )
