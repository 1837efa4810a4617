"""Qwen-Image 2.1: one causal sequence of the text, the images to edit in their places in it, and the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from clora.errors import CloraError
from clora.models.common import MEGAPIXEL, timestep
from clora.models.conditioning import Conditioning
from clora.models.families.qwen_image import QwenImageEditPlusAdapter, attention_mask


class QwenImage21Adapter(QwenImageEditPlusAdapter):
    """Qwen-Image 2.1 with one or several images to edit (see `ModelAdapter`).

    A block has seven linear layers: four of the attention and ``img_mlp.proj``, ``img_mlp.gate_layer``, ``img_mlp.out``.
    The pipeline works on RGBA; here images are opaque, and the alpha of results is dropped.

    In `Text.embeds` the images' places are zero: the transformer puts their latents there.

    Raises:
        CloraError: the pipeline has noise levels of its own, which calls would use instead of the student's.
    """

    _patch = 1  # its autoencoder makes 16 x 16 pixels one latent pixel, so nothing is packed
    _image_mode = "RGBA"
    _source_area = _seen_area = MEGAPIXEL  # a literal in the pipeline's call
    # The model is meant to be sampled without guidance; with it, nothing is rescaled.
    default_guidance = stock_guidance = 0.0
    stock_norm_rescale = False

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        if pipeline.config.sample_sigmas is not None:
            raise CloraError(
                "expected a Qwen-Image 2.1 pipeline without sample_sigmas, found noise levels that its calls use whatever "
                "the number of steps; remove sample_sigmas from its model_index.json"
            )
        super().__init__(pipeline, size, max_sequence_length)

    def _encode_prompt(self, prompt: str, images: list[Image.Image]) -> Tensor:
        embeds, _, places = self.pipeline.encode_prompt([prompt], images, self.pipeline.text_encoder.device)
        # [1, L, D]. The transformer does not read the rows at the images' places; zeros mark these for `velocity`.
        return embeds.masked_fill(places[..., None], 0)

    def _encode(self, images: Tensor) -> Tensor:
        opaque = functional.pad(images, (0, 0, 0, 0, 0, 4 - images.shape[1]), value=1.0)
        return super()._encode(opaque)

    def _decode(self, latents: Tensor) -> Tensor:
        return super()._decode(latents)[:, :3]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        transformer = self.pipeline.transformer
        text = conditioning.text
        num_tokens = x.shape[1]
        # The sources come before the result, which is last in the sequence.
        shapes = [(1, *shape) for shape in (*(conditioning.shapes or self.source_shapes), self._grid)]
        # Zero rows of the text are the images' places, [1, L]; a place stands for 2 x 2 tokens, of the result too.
        places = (text.embeds[:1] == 0).all(-1)
        mask = attention_mask(text, x.device)
        if mask is not None:
            places = places & mask[:1]
        with _positions_without_padding(transformer.pos_embed, mask, num_tokens):
            output = transformer(
                hidden_states=torch.cat([conditioning.source.to(x), x], dim=1).to(transformer.dtype),
                encoder_hidden_states=text.embeds.to(transformer.dtype),
                encoder_hidden_states_mask=mask,
                timestep=timestep(sigma, transformer.dtype),
                img_shapes=[shapes] * len(x),
                img_mask=functional.pad(places, (0, num_tokens // 4), value=True).expand(len(x), -1),
                return_dict=False,
            )[0]
        return output[:, -num_tokens:]


@contextmanager
def _positions_without_padding(rope, mask: Tensor | None, num_tokens: int) -> Iterator[None]:
    """Inside, the result of each row stands right after its own text, as in a call with only this row.

    The transformer has one list of positions for the batch, in which the padding of shorter texts counts.

    Args:
        rope: the transformer's position embedding.
        mask: ``[B, L]``, false at padding.
        num_tokens: tokens of the result, which come last.
    """
    if mask is None:
        yield
        return
    padding = (~mask).sum(1)

    def move_back(module, arguments, freqs: Tensor) -> _RowFreqs:
        # Of the first axis, along which the sequence runs. The conjugate [B, 1, D / 2] turns by the padding backwards.
        back = module.freqs[0][padding].conj()[:, None]
        rows = freqs.repeat(len(padding), 1, 1)
        rows[:, -num_tokens:, : back.shape[-1]] *= back
        return _RowFreqs(rows.unsqueeze(2))

    handle = rope.register_forward_hook(move_back)
    try:
        yield
    finally:
        handle.remove()


class _RowFreqs:
    """Rotations ``[B, S, 1, D]``, own for each row, where the transformer has ``[S, D]`` and makes room for the heads."""

    def __init__(self, freqs: Tensor):
        self._freqs = freqs

    def unsqueeze(self, dim: int) -> Tensor:
        return self._freqs
