"""Qwen-Image-Edit: a vision-language model reads the prompt with the images; their latents follow the noisy ones.

A block has 14 linear layers, and a LoRA changes all of them by default (`block_layers`), as in the paper: eight of the
attention, four of the two MLPs, and the modulations ``img_mod.1`` and ``txt_mod.1``. Usual trainers leave some out:
diffusers and LightX2V train only ``to_q, to_k, to_v, to_out.0``, musubi-tuner no modulation, DiffSynth-Studio no
``net.0.proj``. Four of the last block (``add_q_proj``, ``to_add_out``, ``txt_mlp``) change nothing: no layer reads the
text after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from clora.devices import send
from clora.models.common import MEGAPIXEL, FamilyAdapter, check_limit, num_seen_tokens, only_image, to_pil
from clora.models.conditioning import Conditioning, Text


class QwenImageEditPlusAdapter(FamilyAdapter):
    """Qwen-Image-Edit-2509 and 2511: one or several images to edit (see `ModelAdapter`).

    The pipeline scales guided velocities to the norm of the conditional ones, and so are targets rendered. It guides only
    where a negative prompt is given, here the empty one.

    Args:
        pipeline: a ``QwenImageEditPlusPipeline``.
        size: ``(height, width)`` of the results in pixels, multiples of the pipeline's patch size.
        max_sequence_length: tokens of a prompt, those of template and images not counted. The pipeline cuts none; it
            refuses a limit above its own.

    Raises:
        CloraError: the size does not fit the patch size, or the limit is above the pipeline's.
    """

    text_sees_image = True
    default_guidance = 4.0  # the paper's
    stock_guidance = 3.0  # w = true_cfg_scale - 1, of the pipeline's default 4.0
    stock_norm_rescale = True
    _image_mode = "RGB"

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        super().__init__(pipeline, size, max_sequence_length)
        check_limit(pipeline, max_sequence_length, getattr(pipeline, "tokenizer_max_length", max_sequence_length))
        self.student_call = {"true_cfg_scale": 1.0}
        self.source_shapes = (self._grid_of(*self._scaled(size, self._source_area)),)

    @property
    def image_tokens(self) -> int:
        """See `ModelAdapter`."""
        return num_seen_tokens(self.pipeline.processor.image_processor, *self._scaled(self.size, self._seen_area))

    @property
    def _source_area(self) -> int:
        """Returns the pixels of an image to edit as the autoencoder sees it."""
        return self._module.VAE_IMAGE_SIZE

    @property
    def _seen_area(self) -> int:
        """Returns the pixels of an image to edit as the text encoder sees it."""
        return self._module.CONDITION_IMAGE_SIZE

    def _to_pil(self, image: Tensor) -> Image.Image:
        return to_pil(image).convert(self._image_mode)

    def _encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None) -> Iterator[Text]:
        if not references:
            raise ValueError("expected the images that the prompts are about, which are encoded with them; found none")
        resize = self.pipeline.image_processor.resize
        # One by one: the pipeline takes one set of images for all the prompts of a call. Lengths differ then, so batches
        # have a mask, which the transformer reads.
        for prompt, images in zip(prompts, zip(*references, strict=True), strict=True):
            seen = [resize(self._to_pil(i), *self._scaled(i.shape[-2:], self._seen_area)) for i in images]
            yield Text(self._encode_prompt(prompt, seen).cpu())

    def _encode_prompt(self, prompt: str, images: list[Image.Image]) -> Tensor:
        """Encodes one prompt, ``[1, L, D]``."""
        given = only_image(self.pipeline, images) if self._takes_one_image else images
        return self.pipeline.encode_prompt(prompt, given, self.pipeline.text_encoder.device)[0]

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`; those of the template and of images are not counted."""
        return len(self.pipeline.processor.tokenizer(prompt)["input_ids"])

    def _fit(self, images: Tensor) -> Tensor:
        """Resizes every image to about 1024 x 1024 pixels, as the pipeline does."""
        size = self._scaled(images.shape[-2:], self._source_area)
        preprocess = self.pipeline.image_processor.preprocess
        return torch.cat([preprocess(self._to_pil(image), *size) for image in images])

    def _encode(self, images: Tensor) -> Tensor:
        # The autoencoder is one for videos: an image is a video of one frame, [N, 3, 1, H, W].
        frames = images.unsqueeze(2).to(self.pipeline.vae.dtype)
        latents = self.pipeline._encode_vae_image(frames, generator=None)
        count, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, count, channels, height, width)

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = self.pipeline._unpack_latents(latents, *self.size, self.pipeline.vae_scale_factor).to(vae.dtype)
        # Each latent channel has its own mean and deviation; `_encode_vae_image` has normalised by them.
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1).to(grid)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1).to(grid)
        return vae.decode(grid * std + mean, return_dict=False)[0][:, :, 0]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        # Each image is (frames, height, width) in tokens: the result, then the images to edit.
        shapes = [(1, *shape) for shape in (self._grid, *(conditioning.shapes or self.source_shapes))]
        return self._predict(
            x,
            sigma,
            conditioning,
            encoder_hidden_states_mask=attention_mask(conditioning.text, x.device),
            img_shapes=[shapes] * len(x),
        )


class QwenImageEditAdapter(QwenImageEditPlusAdapter):
    """The first Qwen-Image-Edit: one image, which text encoder and autoencoder see in the same size (see `ModelAdapter`)."""

    _takes_one_image = True
    _source_area = _seen_area = MEGAPIXEL  # a literal in the pipeline's call


def attention_mask(text: Text, device: torch.device) -> Tensor | None:
    """Returns the prompts' mask ``[B, L]`` as a pipeline hands it to its transformer: None if every token counts."""
    return None if text.mask is None or text.mask.all() else send(text.mask, device)
