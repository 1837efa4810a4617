"""Model adapters: what the engine needs to know of a pipeline family, through the pipeline's own methods.

An adapter encodes prompts and images, runs the transformer to a velocity on packed latents, and decodes. Latents are
packed and normalised, ``[B, T, C]``; images are float32 ``[B, 3, H, W]`` in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clora.errors import CloraError


@dataclass(frozen=True)
class Conditioning:
    """What a batch is conditioned on; rows are samples.

    Attributes:
        text: prompt embeddings ``[B, L, D]``.
        source: packed latents of the image to edit ``[B, S, C]``.
    """

    text: Tensor
    source: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows) -> Conditioning:
        return Conditioning(self.text[rows], self.source[rows])

    def with_text(self, text: Tensor) -> Conditioning:
        return Conditioning(text, self.source)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(torch.cat([p.text for p in parts]), torch.cat([p.source for p in parts]))


class Flux2KleinAdapter:
    """FLUX.2 [klein]: text and reference tokens join the latent tokens, 4-D position ids, no guidance embedding.

    Args:
        pipeline: a ``Flux2KleinPipeline`` that is not distilled.
        size: ``(height, width)`` of the images in pixels, multiples of the pipeline's patch size.
        max_sequence_length: text tokens per prompt; a longer prompt is an error, never a silent cut.

    Raises:
        CloraError: the pipeline is distilled (it has no guidance, so it cannot be a teacher's base), or the size
            does not fit the patch size.
    """

    def __init__(self, pipeline, size: tuple[int, int], max_sequence_length: int):
        if pipeline.config.is_distilled:
            raise CloraError(
                "expected a base FLUX.2 [klein] pipeline, found a distilled one (is_distilled = true), which has no "
                "guidance and cannot be the teachers' base; use the undistilled (base) model"
            )
        multiple = pipeline.vae_scale_factor * 2
        if size[0] % multiple or size[1] % multiple:
            raise CloraError(f"expected an image size in multiples of {multiple} pixels, found {size[0]}x{size[1]}")
        self.pipeline = pipeline
        self.size = size
        self.max_sequence_length = max_sequence_length
        height, width = size[0] // multiple, size[1] // multiple
        self.latent_shape = (height * width, pipeline.transformer.config.in_channels)
        grid = torch.zeros(1, 1, height, width)
        self._latent_ids = pipeline._prepare_latent_ids(grid)[0]
        self._image_ids = torch.cat([self._latent_ids, pipeline._prepare_image_ids([grid])[0]])
        self._text_ids = pipeline._prepare_text_ids(torch.zeros(1, max_sequence_length, 1))[0]

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Prompt embeddings ``[N, L, D]``. Raises CloraError for a prompt of more than ``max_sequence_length`` tokens."""
        for prompt in prompts:
            self._check_length(prompt)
        chunks = [list(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
        return torch.cat(
            [self.pipeline.encode_prompt(c, max_sequence_length=self.max_sequence_length)[0] for c in chunks]
        )

    def _check_length(self, prompt: str) -> None:
        messages = [{"role": "user", "content": prompt}]
        tokenizer = self.pipeline.tokenizer
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        count = len(tokenizer(text)["input_ids"])
        if count > self.max_sequence_length:
            raise CloraError(
                f"expected a prompt of at most {self.max_sequence_length} tokens, found {count} in {prompt!r}; "
                "shorten it or raise max_sequence_length"
            )

    @torch.no_grad()
    def encode_images(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Packed normalised latents ``[N, T, C]`` of images ``[N, 3, H, W]`` in [-1, 1]."""
        encode, images = self.pipeline._encode_vae_image, images.to(self.pipeline.vae.device)
        return torch.cat(
            [self.pipeline._pack_latents(encode(chunk, generator=None)) for chunk in images.split(batch_size)]
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 32) -> Tensor:
        """Images ``[N, 3, H, W]`` in [-1, 1] (not clipped) of packed latents ``[N, T, C]``."""
        return torch.cat([self._decode(chunk) for chunk in latents.to(self.pipeline.vae.device).split(batch_size)])

    def _decode(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        height, width = (int(s) + 1 for s in self._latent_ids[-1, 1:3])
        grid = latents.transpose(1, 2).reshape(len(latents), -1, height, width)
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1).to(grid)
        grid = grid * std + vae.bn.running_mean.view(1, -1, 1, 1).to(grid)
        return vae.decode(self.pipeline._unpatchify_latents(grid), return_dict=False)[0]

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's velocity ``eps - x0``.

        Args:
            x: noisy packed latents ``[B, T, C]``.
            sigma: noise levels ``[B]``.
            conditioning: ``B`` rows.

        Returns:
            ``[B, T, C]``.
        """
        output = self.pipeline.transformer(
            hidden_states=torch.cat([x, conditioning.source], dim=1),
            encoder_hidden_states=conditioning.text,
            timestep=sigma.to(x.dtype),
            img_ids=self._image_ids.to(x.device),
            txt_ids=self._text_ids.to(x.device),
            guidance=None,
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


ADAPTERS: dict[str, type] = {"Flux2KleinPipeline": Flux2KleinAdapter}


def adapter_for(pipeline, size: tuple[int, int], max_sequence_length: int) -> Flux2KleinAdapter:
    """The adapter of a loaded pipeline, chosen by its class. Raises CloraError for a family without one."""
    name = type(pipeline).__name__
    if name not in ADAPTERS:
        raise CloraError(f"expected a pipeline of one of {sorted(ADAPTERS)}, found {name}; it is not supported yet")
    return ADAPTERS[name](pipeline, size, max_sequence_length)


def linear_names(transformer) -> list[str]:
    """Names of all linear layers inside the transformer's blocks, the default LoRA targets."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    ]
