"""The precision in which the studio is trained and measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clora.devices import multiplies_bfloat16
from clora.models.conditioning import Conditioning
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.scenes import SIZE
from clora.studio.text import MAX_SEQUENCE_LENGTH


@contextmanager
def reduced_precision(device: torch.device) -> Iterator[None]:
    """Computes in bfloat16 on GPUs and on CPUs that multiply in it, where it is faster; weights stay as they are."""
    if device.type == "cpu" and not multiplies_bfloat16():
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        yield


class ReducedAdapter(Flux2KleinAdapter):
    """A pipeline whose transformer computes in reduced precision; all else, noise and velocities too, is in its own dtype."""

    def __init__(self, pipeline, size: int = SIZE, max_sequence_length: int = MAX_SEQUENCE_LENGTH):
        super().__init__(pipeline, (size, size), max_sequence_length)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See `ModelAdapter.velocity`."""
        with reduced_precision(x.device):
            return super().velocity(x, sigma, conditioning).to(x.dtype)
