"""What the kernels' tests share; they run in Triton's interpreter where there is no GPU (tests/conftest.py)."""

import os

import pytest
import torch

TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
"""Those that tests compile for (`helpers.triton_compiler`)."""


def pytest_collection_modifyitems(items):
    """Leaves it to machines without a GPU to compile for other GPUs than their own."""
    if not torch.cuda.is_available():
        return
    own = torch.cuda.get_device_properties(0)
    name = own.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{own.major}{own.minor}"
    skip = pytest.mark.skip(
        reason="compiles for another GPU than this machine's: left to machines without one, such as CI"
    )
    for item in items:
        if _targets(item) - {name}:
            item.add_marker(skip)


def _targets(item) -> set[str]:
    """The GPUs that a test's parameters name."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    named = set()
    for value in parameters:
        named.update(part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, str))
    return named & TARGETS


@pytest.fixture(scope="session")
def triton_cache(tmp_path_factory):
    """A folder for compiled kernels, one for all workers: tests of one file may run in several, and compile the same ones."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "triton"


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
