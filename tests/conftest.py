"""What all tests share: the environment of each process, the cores that they run on, and the tiny pipeline."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clora.threads import limit_spinning

# OpenMP reads these once, when torch is imported.
limit_spinning()
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
KERNELS = Path(__file__).parent / "csrc_triton"
WORKER_BYTES = 3 << 30
"""Memory of a GPU for one worker: its context, and the largest test in fp64."""
if IN_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # one worker a core; subprocesses inherit it
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # not a pool of processes for each worker

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Triton decides once, when it is first imported, that its kernels run in its interpreter. Diffusers imports it too,
    # so that every test process has to choose before any test module is read.
    os.environ["TRITON_INTERPRET"] = "1"

# Runs whose bits are compared have the same threads, whatever else keeps the cores busy: clora chooses none.
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

from clora.models.conditioning import Conditioning, Text  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Runs folders on all cores, and files or tests in this process, where a debugger works; ``-n`` overrides it.

    Not in pyproject.toml, whose options would stop a pytest without pytest-xdist.
    """
    if not config.pluginmanager.hasplugin("xdist") or IN_WORKER or config.option.dist != "no":
        return
    if config.option.numprocesses is None and any(Path(path).is_dir() for path in config.args):
        config.option.numprocesses = "auto"
    if config.option.numprocesses:
        config.option.dist = "worksteal"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """All cores; on a GPU as many as its memory holds. Kernels are compiled on the CPU, which takes most of its tests' time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not torch.cuda.is_available():
        return None
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(cores, memory // WORKER_BYTES))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hides a GPU from tests of neither kernels nor the mark `gpu`: they compare bits and dtypes, alike on every machine."""
    if item.get_closest_marker("gpu") or KERNELS in item.path.parents:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that the test starts
        return (yield)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved tiny pipeline, loadable by ``from_pretrained``."""
    from clora.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter():
    """The adapter of one shared tiny pipeline; a test that attaches a bank detaches it again."""
    from clora.testing import tiny_adapter

    return tiny_adapter()


@pytest.fixture
def inputs(adapter):
    """Returns inputs(n, seed): noisy latents, noise levels and conditioning of n different samples."""

    def make(n=5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        embeds = torch.randn(n, adapter.max_sequence_length, 24, generator=generator)
        source, x = torch.randn(2, n, *adapter.latent_shape, generator=generator)
        return x, torch.rand(n, generator=generator) * 0.8 + 0.1, Conditioning(Text(embeds), source)

    return make
