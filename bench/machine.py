"""The place of a measurement: GPU, versions, revision of the sources, and the roof of the GPU in the same run."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.timing import Stopwatch, interleave

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("bench", "csrc_triton", "clora/bank", "clora/ops.py")
NOT_SOURCES = (
    "bench/results",
    "bench/compose.py",
    "bench/design_table.py",
    "bench/goals.py",
    "bench/gpu.py",
    "bench/host.py",
    "bench/precision.py",
    "bench/profiled.py",
    "bench/report.py",
    "bench/serving.py",
    "bench/step",
    "bench/tasks.py",
    "bench/teachers.py",
    "bench/update.py",
    "bench/update_worker.py",
    "bench/wheels.json",
    "bench/wheels.py",
    "csrc_triton/multi_lora/designs.json",
)
"""In those folders, but without influence on a measurement: results may be committed and judged between two runs. From the
table of designs a record keeps the choice for its case (`bench.worker.chosen_designs`)."""
SUFFIXES = (".py", ".json")
TREE = ("bench", "clora", "csrc_triton", "tests")
NOT_TREE = ("bench/results",)
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
ROOF_SIZE = 8192
"""Rows and columns of the product: 1.1 TFLOP, operands of 128 MiB."""
COPY_BYTES = 2 << 30
"""Far above any L2 cache."""


def slug(gpu: str) -> str:
    """The folder of a GPU's results: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def describe(device: torch.device) -> dict:
    """Everything about this machine and this tree that is kept beside a measurement."""
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "driver": (_output(DRIVER, ROOT) or "unknown").splitlines()[0],
        "commit": commit(),
        "revision": revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "triton": _version("triton"),
        "peft": _version("peft"),
    }


def describe_host() -> dict:
    """Everything about this machine that a record of a CPU keeps."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "peft": _version("peft"),
    }


def _processor() -> str:
    """The processor's name and the widest instructions that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def measure_roof(device: torch.device, stopwatch: Stopwatch) -> dict[str, float]:
    """Rates of a large bf16 matrix product of random numbers and of a large copy, reads and writes counted."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn(ROOF_SIZE, ROOF_SIZE, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    source = torch.randint(-128, 128, (COPY_BYTES,), generator=generator, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = interleave(calls, stopwatch, rounds=15, warmup=5)
    return {
        # A product takes 2 N^3 operations; a copy reads and writes each byte.
        "tflop_per_s": 2 * ROOF_SIZE**3 / times["product"]["median_ms"] / 1e9,
        "gb_per_s": 2 * COPY_BYTES / times["copy"]["median_ms"] / 1e6,
    }


def revision(root: Path = ROOT) -> str:
    """Hash of the Python and JSON files that a measurement depends on: with the same one it need not be repeated."""
    return _hash(root, SOURCES, NOT_SOURCES)


def tree(root: Path = ROOT) -> str:
    """The same of all files, for what depends on any: tests, whole updates, the demo."""
    return _hash(root, TREE, NOT_TREE)


def _hash(root: Path, paths: Sequence[str], without: Sequence[str]) -> str:
    digest = hashlib.sha256()
    files = []
    for path in paths:
        found = (root / path).rglob("*") if (root / path).is_dir() else [root / path]
        files += [file for file in found if file.suffix in SUFFIXES]
    for file in sorted(files):
        relative = file.relative_to(root)
        if not any(relative.is_relative_to(path) for path in without):
            # Names count too: a renamed file makes another revision.
            digest.update(relative.as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """The checkout's commit, with "+" if files were changed; in a copy without git, the variable or the file GIT_COMMIT."""
    head = _output(["git", "rev-parse", "--short=12", "HEAD"], root)
    if head is None:
        file = root / "GIT_COMMIT"
        return os.environ.get("GIT_COMMIT") or (file.read_text("utf-8").strip() if file.is_file() else "unknown")
    return head + "+" * (_output(["git", "status", "--porcelain", "-uno"], root) != "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _output(command: Sequence[str], folder: Path) -> str | None:
    """The output of a command; None where it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
