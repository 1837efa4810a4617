"""Parts that the tiny pipelines of several families have in common."""

from __future__ import annotations

import torch


def ready(pipeline):
    """Returns the pipeline, frozen and silent."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def autoencoder():
    """Makes an ``AutoencoderKL`` of 8 x 8 pixels to a latent pixel of 16 channels, normalised as FLUX.1's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def without_videos(kind):
    """Returns a stock processor's class without its part for videos, which needs torchvision."""

    class WithoutVideos(kind):
        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

        def save_pretrained(self, folder):
            self.tokenizer.save_pretrained(folder)
            self.image_processor.save_pretrained(folder)

    return WithoutVideos
