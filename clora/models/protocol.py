"""The protocol of model adapters, by which the engine runs any family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clora.models.conditioning import Conditioning, Shapes, Text


class ModelAdapter(Protocol):
    """A pipeline family as the engine sees it.

    Latents are packed and normalised, ``[B, T, C]``; images are float32 ``[B, 3, H, W]`` in [-1, 1]. Results of encoding
    and decoding are on the CPU, whatever device the encoders are on.

    Attributes:
        pipeline: the diffusers pipeline, whose ``transformer`` carries the bank.
        size: height and width in pixels of the images it makes.
        max_sequence_length: the most text tokens of a prompt.
        latent_shape: ``(T, C)`` of an image of that size.
        latent_dtype: of the velocities, in which a stock call keeps latents from step to step.
        source_shapes: size in tokens of the source, if it is one image of `size`.
        text_sees_image: true if a prompt is encoded together with the images to edit.
        image_tokens: rows of an encoded prompt beyond `max_sequence_length`: padding, and those of the image to edit if
            it is one image of `size`.
        default_guidance: guidance w that teachers score with by default; 0 if a stock call has no second, empty-prompt
            pass.
        stock_guidance: guidance w of a stock call, by which teachers render targets.
        stock_norm_rescale: true if a stock call rescales guided velocities to the norm of the conditional ones.
        guidance_embedding: guidance scale embedded in every pass, of student, critic and teachers alike; None for a
            family without guidance embedding.
        student_call: the keyword arguments with which a stock call runs the student, besides prompt, picture, steps, size
            and ``max_sequence_length``; their values are numbers.
    """

    pipeline: Any
    size: tuple[int, int]
    max_sequence_length: int
    latent_shape: tuple[int, int]
    latent_dtype: torch.dtype
    source_shapes: Shapes
    text_sees_image: bool
    image_tokens: int
    default_guidance: float
    stock_guidance: float
    stock_norm_rescale: bool
    guidance_embedding: float | None
    student_call: Mapping[str, float]

    def num_tokens(self, prompt: str) -> int:
        """Counts the tokens of a prompt as ``max_sequence_length`` does; only the tokenizer is read."""
        ...

    def encode_prompts(self, prompts: Sequence[str], references: Sequence[Tensor] | None = None) -> Text:
        """Encodes N prompts.

        Args:
            prompts: N of them.
            references: the images that each prompt is about, K tensors ``[N, 3, H, W]``; read only where
                ``text_sees_image``.

        Raises:
            CloraError: a prompt is longer than ``max_sequence_length``; it is never cut silently.
        """
        ...

    def encode_sources(self, references: Sequence[Tensor]) -> tuple[Tensor, Shapes]:
        """Encodes images to edit, resized as the pipeline resizes them.

        Args:
            references: K tensors ``[N, 3, H, W]``, the images of N samples; K = 1 for a single image each.

        Returns:
            Packed latents ``[N, S, C]`` and the images' sizes in tokens.
        """
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Returns packed latents ``[N, T, C]`` of images ``[N, 3, H, W]`` of the adapter's size: results to learn."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Returns images ``[N, 3, H, W]`` in [-1, 1] (not clipped) of packed latents ``[N, T, C]``."""
        ...

    def teacher_schedule(self, steps: int) -> Tensor:
        """Returns the noise levels ``[steps + 1]``, the last 0, that a stock call of the pipeline runs through."""
        ...

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the transformer's velocity ``eps - x0``.

        Args:
            x: noisy packed latents ``[B, T, C]``.
            sigma: noise levels ``[B]``.
            conditioning: ``B`` rows.

        Returns:
            ``[B, T, C]`` in ``latent_dtype``.
        """
        ...
