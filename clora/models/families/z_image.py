"""Z-Image Omni: captions in segments around the images; clean references and their SigLIP features beside noisy latents."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import prod

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clora.models.common import check_lengths, check_size, in_chunks, linear_mu, stock_schedule, to_pil
from clora.models.conditioning import Conditioning, Shapes, Text

MAX_AREA = 1024 * 1024  # pixels of a reference; the pipeline brings larger ones to the area of its result
# The part of a caption that holds the prompt, to count its tokens.
PROMPT_SEGMENT = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"


class ZImageOmniAdapter:
    """Z-Image Omni: the pipeline's ``guidance_scale`` is w itself, not w + 1, and a call without guidance has 0.

    An image to edit is read twice, as latents and as SigLIP features. A source has both, in rows of the latents' width:
    the latents of all its images, then the features of all of them. Its shapes are the images' sizes in latent tokens,
    then the sizes of their feature grids.

    A prompt is encoded in segments, one before each image and two more; in `Text` they follow each other, a masked row
    after each.

    Velocities are fp32 whatever the transformer's dtype, so that latents are kept in fp32 from step to step, as in the
    pipeline.

    Args:
        pipeline: a ``ZImageOmniPipeline``.
        size: ``(height, width)`` of the images in pixels, multiples of the pipeline's patch size.
        max_sequence_length: text tokens per segment of a caption, that with the prompt being the longest; a longer
            prompt is an error, never a silent cut.

    Raises:
        CloraError: the size does not fit the patch size.
    """

    text_sees_image = False
    image_tokens = 0
    default_guidance = 5.0
    guidance_embedding = None
    latent_dtype = torch.float32

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        self._multiple = pipeline.vae_scale_factor * 2
        check_size(size, self._multiple)
        self.pipeline = pipeline
        self.size = size
        self.max_sequence_length = max_sequence_length
        self.student_call = {"guidance_scale": 0.0}  # 1 would be a second, guided pass
        self._grid = (size[0] // self._multiple, size[1] // self._multiple)
        self.latent_shape = (prod(self._grid), pipeline.transformer.config.in_channels * 4)
        self.source_shapes = (self._grid, self._feature_grid(size))

    def _feature_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in SigLIP features of an image."""
        blank = Image.new("RGB", size[::-1])
        height, width = self.pipeline.siglip_processor(images=[blank], return_tensors="pt").spatial_shapes[0].tolist()
        return height, width

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """See `ModelAdapter.encode_prompts`; of the references only their number is read, which is 1 for None."""
        check_lengths(self, prompts)
        num_images = 1 if references is None else len(references)
        return Text.cat([self._encode_prompt(prompt, num_images) for prompt in prompts])

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        return len(self.pipeline.tokenizer(PROMPT_SEGMENT.format(prompt))["input_ids"])

    def _encode_prompt(self, prompt: str, num_images: int) -> Text:
        (segments,), _ = self.pipeline.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            num_condition_images=num_images,
        )
        embeds = torch.cat([functional.pad(segment, (0, 0, 0, 1)) for segment in segments])
        mask = torch.cat([functional.pad(torch.ones(len(s), dtype=torch.bool), (0, 1)) for s in segments])
        return Text(embeds[None].cpu(), mask[None])

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`; the features of an image are of it as it is before it is cropped to patches."""
        fitted = [[self._fit(to_pil(image)) for image in images] for images in references]
        latents = [self._encode_cropped(images) for images in fitted]
        features = [self._encode_features(images) for images in fitted]
        grids = [(images[0].height // self._multiple, images[0].width // self._multiple) for images in fitted]
        width = self.latent_shape[1]
        rows = [*latents, *(grid.flatten(1).unflatten(1, (-1, width)) for grid in features)]
        return torch.cat(rows, dim=1), (*grids, *((grid.shape[1], grid.shape[2]) for grid in features))

    def _fit(self, image: Image.Image) -> Image.Image:
        if image.width * image.height <= MAX_AREA:
            return image
        return self.pipeline.image_processor._resize_to_target_area(image, self.size[0] * self.size[1])

    def _encode_cropped(self, images: Sequence[Image.Image]) -> Tensor:
        height, width = (side // self._multiple * self._multiple for side in (images[0].height, images[0].width))
        preprocess = self.pipeline.image_processor.preprocess
        cropped = [preprocess(image, height=height, width=width, resize_mode="crop") for image in images]
        return self.encode_images(torch.cat(cropped))

    def _encode_features(self, images: Sequence[Image.Image]) -> Tensor:
        """SigLIP's features, ``[N, h, w, D]``."""
        device = self.pipeline.siglip.device
        (features,) = self.pipeline.prepare_siglip_embeds(list(images), 1, device, torch.float32)
        return torch.stack(features).cpu()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See `ModelAdapter.encode_images`; any size that is a multiple of the patch size."""
        return in_chunks(self._encode, images.to(self.pipeline.vae.device), images.shape[-2:]).cpu()

    def _encode(self, images: Tensor) -> Tensor:
        """Latents in fp32. The pipeline rounds pixels to bfloat16 and so takes a bfloat16 VAE only; this takes any."""
        vae = self.pipeline.vae
        latents = vae.encode(images.bfloat16().to(vae.dtype)).latent_dist.mode()
        return _pack((latents - vae.config.shift_factor) * vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See `ModelAdapter.decode`."""
        return in_chunks(self._decode, latents.to(self.pipeline.vae.device), self.size).cpu()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = _unpack(latents.to(vae.dtype), self._grid)
        return vae.decode(grid / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    def teacher_schedule(self, steps: int) -> Tensor:
        """See `ModelAdapter.teacher_schedule`."""
        return stock_schedule(self.pipeline.scheduler, steps, linear_mu(self.pipeline, self.latent_shape[0]))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`; fp32. The transformer's own output is its negative."""
        transformer = self.pipeline.transformer
        shapes = conditioning.shapes or self.source_shapes
        clean, features = self._split(conditioning.source.to(x.device, transformer.dtype), shapes)
        noisy = _unpack(x.to(transformer.dtype), self._grid)
        images = [grid.unsqueeze(2) for grid in (*clean, noisy)]
        output = transformer(
            x=[list(row) for row in zip(*images, strict=True)],
            t=(1000 - 1000 * sigma.float()) / 1000,
            cap_feats=_segments(conditioning.text, transformer.dtype),
            siglip_feats=[[*row, None] for row in zip(*features, strict=True)],
            image_noise_mask=[[0] * len(clean) + [1]] * len(x),
            return_dict=False,
        )[0]
        return -_pack(torch.stack(output).squeeze(2)).float()

    def _split(self, source: Tensor, shapes: Shapes) -> tuple[list[Tensor], list[Tensor]]:
        """Latents ``[B, C, H, W]`` and features ``[B, h, w, D]`` of each image of a source."""
        num_images, width = len(shapes) // 2, self.pipeline.transformer.config.siglip_feat_dim
        grids, feature_grids = shapes[:num_images], shapes[num_images:]
        rows_per_feature = width // self.latent_shape[1]
        lengths = [prod(grid) for grid in grids] + [prod(grid) * rows_per_feature for grid in feature_grids]
        parts = source.split(lengths, dim=1)
        latents = [_unpack(part, grid) for part, grid in zip(parts, grids, strict=False)]
        features = [
            part.flatten(1).unflatten(1, (*grid, width))
            for part, grid in zip(parts[num_images:], feature_grids, strict=True)
        ]
        return latents, features


def _pack(grid: Tensor) -> Tensor:
    """Latents ``[B, C, H, W]`` as the transformer's patches of 2 x 2, ``[B, T, 4 C]``."""
    return functional.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2)


def _unpack(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    return functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, grid), 2)


def _segments(text: Text, dtype: torch.dtype) -> list[list[Tensor]]:
    """Each row's segments, ``[L, D]`` each."""
    embeds = text.embeds.to(dtype)
    return [_runs(row, mask) for row, mask in zip(embeds, text.mask.tolist(), strict=True)]


def _runs(row: Tensor, mask: Sequence[bool]) -> list[Tensor]:
    """The stretches of a row that the mask keeps."""
    runs = [(kept, len(list(group))) for kept, group in groupby(mask)]
    parts = row.split([length for _, length in runs])
    return [part for part, (kept, _) in zip(parts, runs, strict=True) if kept]
