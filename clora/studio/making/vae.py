"""The studio's image autoencoder: a tiny ``AutoencoderKLFlux2`` trained on scenes, edits and effects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clora.studio.edits import sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.making.linear_encoder import set_linear_encoder, zero_residual_branches
from clora.studio.making.optimizers import rate_factor, resume
from clora.studio.photographs import Photographs
from clora.studio.pixels import to_tensor
from clora.studio.precision import reduced_precision
from clora.studio.scenes import SIZES, make_scene, render
from clora.training.checkpoint import save_state

PICTURES = 4
"""Of an update, which takes as many crops of each."""
CROP = 32
CROP_SHARE = 0.9
LEARNING_RATE = 2e-3
CHECKPOINT_EVERY = 500
SAMPLES = 512
"""Pictures of each size that set the encoder and the statistics of the latents."""


def make_vae():
    """Makes an untrained autoencoder: 64x64 pixels to 16x16x32, i.e. 8x8 tokens of 128 channels.

    Its residual branches are zero.
    """
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 80),
        decoder_block_out_channels=(32, 96, 128),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        sample_size=64,
    )
    zero_residual_branches(vae)
    return vae


def training_images(rng: np.random.Generator, count: int, size: int, photographs: Photographs) -> Tensor:
    """Draws pictures in equal parts from scenes, their edits and their effects: ``[count, 3, size, size]`` in [-1, 1]."""
    images = []
    for _ in range(count):
        scene = make_scene(int(rng.integers(1 << 62)), "train", 1, photographs)
        kind = rng.integers(3)
        if kind == 0:
            images.append(render(scene, size))
        elif kind == 1:
            images.append(sample_edit(scene, rng, size=size, photographs=photographs).result)
        else:
            images.append(EFFECTS[str(rng.choice(list(EFFECTS)))].apply(render(scene, size), rng))
    return to_tensor(np.stack(images))


def train_vae(
    updates: int,
    seed: int,
    checkpoint: Path,
    photographs: Photographs,
    device: torch.device,
    report: Callable[[int, dict[str, float]], None],
):
    """Trains the decoder against the linear encoder and sets the latent statistics; returns the model in eval mode.

    Updates on pictures of 64 x 64 and of 128 x 128 take turns. Noise on the latents (of unit variance) teaches the decoder to
    forgive a generator's errors. ``report(update, values)`` is called after each update with the PSNR in dB. Resumes from
    ``checkpoint`` if it exists.
    """
    torch.manual_seed(seed)
    vae = make_vae().train()
    samples = {size: training_images(np.random.default_rng([seed, size]), SAMPLES, size, photographs) for size in SIZES}
    set_linear_encoder(vae, samples[64])
    vae.to(device)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizers = {"decoder": torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: weight for name, weight in vae.state_dict().items() if weight.is_floating_point()}
    recipe = {"updates": updates, "seed": seed, "pictures": photographs.digest()}
    for update in range(resume(checkpoint, state, optimizers, generator, recipe), updates):
        factor = rate_factor(update, updates, warmup=0.05 * updates, decay=0.5)
        optimizers["decoder"].param_groups[0]["lr"] = LEARNING_RATE * factor
        images = _update_images(update, updates, seed, photographs)
        loss, mse = _reconstruction_loss(vae, images.to(device), generator)
        optimizers["decoder"].zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers["decoder"].step()
        report(update + 1, {"psnr": -10 * float(np.log10(mse))})
        if (update + 1) % CHECKPOINT_EVERY == 0:
            save_state(checkpoint, state, optimizers, generator, {"update": update + 1, "recipe": recipe})
    set_latent_statistics(vae.eval(), torch.cat([vae_latents(vae, images) for images in samples.values()]))
    return vae


def _update_images(update: int, updates: int, seed: int, photographs: Photographs) -> Tensor:
    """Draws an update's crops, or whole pictures in the last updates: ``[N, 3, H, W]`` in [-1, 1]."""
    rng = np.random.default_rng([seed, update, 1])
    size = SIZES[update % 2]
    images = training_images(rng, PICTURES, size, photographs)
    if update >= CROP_SHARE * updates:
        return images
    crops = []
    for _ in range(PICTURES):
        # Their places lie on the borders of tokens.
        y, x = 8 * rng.integers(0, (size - CROP) // 8 + 1, 2)
        crops.append(images[:, :, y : y + CROP, x : x + CROP])
    return torch.cat(crops)


def _reconstruction_loss(vae, images: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Returns the loss and the mean squared error in [0, 1] pixel units: pixels run from -1 to 1, hence the 4."""
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
    # Each image has its own amount of noise: the decoder meets nearly clean latents too.
    amount = 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = (amount * torch.randn(latents.shape, generator=generator)).to(latents)
    with reduced_precision(images.device):
        decoded = vae.decode(latents + noise).sample
    error = decoded.float() - images
    loss = error.square().mean() + 0.3 * error.abs().mean()
    return loss, float(error.detach().square().mean()) / 4


@torch.no_grad()
def vae_latents(vae, images: Tensor) -> Tensor:
    """Encodes images to packed latents, one row per token: ``[K, 128]``."""
    from diffusers import Flux2KleinPipeline

    rows = []
    for chunk in images.to(vae.device).split(32):
        packed = Flux2KleinPipeline._patchify_latents(vae.encode(chunk).latent_dist.mode())
        rows.append(packed.permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(rows)


@torch.no_grad()
def set_latent_statistics(vae, tokens: Tensor) -> None:
    """Sets the batch-norm buffers with which the pipeline whitens packed latents ``[K, 128]`` (mean and variance per channel)."""
    vae.bn.running_mean.copy_(tokens.mean(0))
    vae.bn.running_var.copy_(tokens.var(0))
