"""What the kernels' tests share; they run in Triton's interpreter where there is no GPU (tests/conftest.py)."""

import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Memory that is allocated for a result is first filled with NaN, so that an element that a kernel forgets to write shows."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(torch.nan) if type(out) is torch.Tensor and out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """The same of `torch.empty`, for outputs and workspaces of the loss: NaN, or True where boolean."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", poisoned)
