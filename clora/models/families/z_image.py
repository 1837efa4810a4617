"""Z-Image Omni: captions in segments around the images; clean references and SigLIP features beside noisy latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import prod

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clora.models.common import FamilyAdapter
from clora.models.conditioning import Conditioning, Shapes, Text

# The part of a caption that holds the prompt, to count its tokens.
PROMPT_SEGMENT = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n<|vision_start|>"


class ZImageOmniAdapter(FamilyAdapter):
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

    default_guidance = stock_guidance = 5.0  # w = guidance_scale here
    latent_dtype = torch.float32

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        super().__init__(pipeline, size, max_sequence_length)
        self.student_call = {"guidance_scale": 0.0}  # 1 would be a second, guided pass
        # The transformer makes tokens of 2 x 2 latent pixels itself, so its channels are those of one pixel.
        self.latent_shape = (prod(self._grid), pipeline.transformer.config.in_channels * 4)
        blank = Image.new("RGB", size[::-1])
        height, width = pipeline.siglip_processor(images=[blank], return_tensors="pt").spatial_shapes[0].tolist()
        self.source_shapes = (self._grid, (height, width))

    def _encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None) -> Iterator[Text]:
        # Only the number of images is read, which decides where a caption is cut; 1 where none are given.
        num_images = 1 if references is None else len(references)
        for prompt in prompts:
            (segments,), _ = self.pipeline.encode_prompt(
                [prompt],
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
                num_condition_images=num_images,
            )
            # All segments [L, D] in one row [1, L', D], where a masked row of zeros ends each; see `_segments`.
            embeds = torch.cat([functional.pad(segment, (0, 0, 0, 1)) for segment in segments])
            mask = torch.cat([functional.pad(torch.ones(len(s), dtype=torch.bool), (0, 1)) for s in segments])
            yield Text(embeds[None].cpu(), mask[None])

    def num_tokens(self, prompt: str) -> int:
        """See `ModelAdapter.num_tokens`."""
        return len(self.pipeline.tokenizer(PROMPT_SEGMENT.format(prompt))["input_ids"])

    @torch.no_grad()
    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """See `ModelAdapter.encode_sources`; the features are those of an image before it is cropped to patches.

        Images of more than a megapixel are first scaled to the result's area, as the pipeline does.
        """
        latents = []
        grids = []
        features = []
        feature_grids = []
        for images in references:
            whole = [self._reduced(image, prod(self.size)) for image in images]
            cropped = torch.cat([self._cropped(picture) for picture in whole])
            latents.append(self.encode_images(cropped))
            grids.append(self._grid_of(*cropped.shape[-2:]))
            (seen,) = self.pipeline.prepare_siglip_embeds(whole, 1, self.pipeline.siglip.device, torch.float32)
            seen = torch.stack(seen).cpu()
            feature_grids.append((seen.shape[1], seen.shape[2]))
            # [N, h, w, D] as rows of the latents' width, [N, h w D / C, C], so that both go into one tensor.
            features.append(seen.flatten(1).unflatten(1, (-1, self.latent_shape[1])))
        return torch.cat([*latents, *features], dim=1), (*grids, *feature_grids)

    def _encode(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        # The pipeline rounds pixels to bfloat16 and so takes only a bfloat16 VAE; this takes any. Latents are fp32.
        latents = vae.encode(images.bfloat16().to(vae.dtype)).latent_dist.mode()
        return _pack((latents - vae.config.shift_factor) * vae.config.scaling_factor).float()

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        grid = _unpack(latents.to(vae.dtype), self._grid)
        return vae.decode(grid / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`; fp32."""
        transformer = self.pipeline.transformer
        shapes = conditioning.shapes or self.source_shapes
        clean, features = self._split(conditioning.source.to(x.device, transformer.dtype), shapes)
        noisy = _unpack(x.to(transformer.dtype), self._grid)
        # For each sample a list of its images [C, 1, H, W], the clean references and then the noisy latents. Its time runs
        # from 0 (noise) to 1, the other way round than sigma, and is never rounded to the transformer's dtype.
        images = [grid.unsqueeze(2) for grid in (*clean, noisy)]
        output = transformer(
            x=[list(row) for row in zip(*images, strict=True)],
            t=(1000 - 1000 * sigma.float()) / 1000,
            cap_feats=_segments(conditioning.text, transformer.dtype),
            siglip_feats=[[*row, None] for row in zip(*features, strict=True)],
            image_noise_mask=[[0] * len(clean) + [1]] * len(x),
            return_dict=False,
        )[0]
        # With time reversed it predicts x0 - eps.
        return -_pack(torch.stack(output).squeeze(2)).float()

    def _split(self, source: Tensor, shapes: Shapes) -> tuple[list[Tensor], list[Tensor]]:
        """Returns latents ``[B, C, H, W]`` and features ``[B, h, w, D]`` of each image of a source."""
        width = self.pipeline.transformer.config.siglip_feat_dim
        num_images = len(shapes) // 2
        grids = shapes[:num_images]
        feature_grids = shapes[num_images:]
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
    """Packs latents ``[B, C, H, W]`` into the transformer's patches of 2 x 2, ``[B, T, 4 C]``."""
    # The pipeline has no method for this: its transformer takes the unpacked grid, and the packed form is the engine's.
    return functional.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2)


def _unpack(latents: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverts `_pack`, for ``grid`` tokens in height and width."""
    return functional.pixel_shuffle(latents.transpose(1, 2).unflatten(2, grid), 2)


def _segments(text: Text, dtype: torch.dtype) -> list[list[Tensor]]:
    """Returns each row's segments, ``[L, D]`` each: the stretches that the mask keeps."""
    segments = []
    for row, mask in zip(text.embeds.to(dtype), text.mask.tolist(), strict=True):
        runs = [(is_kept, len(list(group))) for is_kept, group in groupby(mask)]
        parts = row.split([length for _, length in runs])
        segments.append([part for part, (is_kept, _) in zip(parts, runs, strict=True) if is_kept])
    return segments
