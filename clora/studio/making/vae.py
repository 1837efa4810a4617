"""The studio's image autoencoder: a tiny ``AutoencoderKLFlux2`` trained on scenes, edits and effects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clora.studio.edits import sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.making.linear_encoder import set_linear_encoder, zero_residual_branches
from clora.studio.pixels import to_tensor
from clora.studio.scenes import make_scene, render

BATCH = 8
LEARNING_RATE = 1.2e-3
CROP_SHARE = 0.9


def make_vae():
    """Makes an untrained autoencoder: 64x64 pixels to 16x16x32, i.e. 8x8 tokens of 128 channels.

    Its residual branches are zero.
    """
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 80),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=8,
        sample_size=64,
    )
    zero_residual_branches(vae)
    return vae


def training_images(rng: np.random.Generator, count: int) -> Tensor:
    """Draws images in equal parts from scenes, their edits and their effects: ``[count, 3, 64, 64]`` in [-1, 1]."""
    images = []
    for i in range(count):
        scene = make_scene(int(rng.integers(1 << 31)))
        if i % 3 == 0:
            images.append(render(scene))
        elif i % 3 == 1:
            images.append(sample_edit(scene, rng).result)
        else:
            images.append(EFFECTS[str(rng.choice(list(EFFECTS)))].apply(render(scene), rng))
    return to_tensor(np.stack(images))


def train_vae(updates: int, seed: int, device: torch.device, report: Callable[[int, dict[str, float]], None]):
    """Trains the decoder against the linear encoder and sets the latent statistics; returns the model in eval mode.

    Noise on the latents (of unit variance) teaches the decoder to forgive a generator's errors.
    ``report(update, values)`` is called after each update with the mean squared error in [0, 1] pixel units and the
    same as PSNR in dB.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    vae = make_vae().train()
    set_linear_encoder(vae, training_images(rng, 768))
    vae.to(device)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=updates, pct_start=0.1)
    for update in range(updates):
        images = training_images(rng, BATCH).to(device)
        if update < CROP_SHARE * updates:
            # Two random 32x32 crops of each image: half the pixels per update, twice the images per second.
            corners = 4 * rng.integers(0, 9, (2 * BATCH, 2))
            images = torch.stack([images[i // 2, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(corners)])
        loss, mse = _reconstruction_loss(vae, images)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        report(update, {"mse": mse, "psnr": -10 * float(np.log10(mse))})
    set_latent_statistics(vae.eval(), rng)
    return vae


def _reconstruction_loss(vae, images: Tensor) -> tuple[Tensor, float]:
    """Returns the loss and the mean squared error in [0, 1] pixel units: pixels run from -1 to 1, hence the 4."""
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
    # Each image has its own amount of noise: the decoder meets nearly clean latents too.
    amount = 0.1 * torch.rand(len(images), 1, 1, 1).to(images)
    error = vae.decode(latents + amount * torch.randn_like(latents)).sample - images
    loss = error.square().mean() + 0.3 * error.abs().mean()
    return loss, float(error.detach().square().mean()) / 4


@torch.no_grad()
def set_latent_statistics(vae, rng: np.random.Generator, batches: int = 48) -> None:
    """Sets the batch-norm buffers with which the pipeline whitens packed latents (mean and variance per channel)."""
    from diffusers import Flux2KleinPipeline

    packed = []
    for _ in range(batches):
        latents = vae.encode(training_images(rng, BATCH).to(vae.device)).latent_dist.mode()
        packed.append(Flux2KleinPipeline._patchify_latents(latents))
    packed = torch.cat(packed)
    vae.bn.running_mean.copy_(packed.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(packed.var(dim=(0, 2, 3)))
