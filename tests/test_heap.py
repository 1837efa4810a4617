"""The C library keeps freed memory for the next step: asked for in a process of its own, whose settings are no others' business."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Two blocks of 16 MiB, one freed: glibc would map each, and unmap it at once.
SCRIPT = """
import ctypes, platform
from clora.heap import keep_freed_memory
if platform.libc_ver()[0] != "glibc":
    raise SystemExit("other")
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
mapped = lambda: sum(1 for line in open("/proc/self/maps") if "[heap]" in line and size(line) > 16 << 20)
size = lambda line: (lambda a, b: int(b, 16) - int(a, 16))(*line.split()[0].split("-"))
block = libc.malloc(16 << 20)
print(mapped(), end=" ")
libc.free(block)
print(mapped())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")
@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1 1"), ({"MALLOC_ARENA_MAX": "4"}, "0 0"), ({"GLIBC_TUNABLES": "glibc.malloc.check=0"}, "0 0")],
)
def test_a_freed_block_stays_in_the_heap_unless_the_user_has_set_the_allocator(given, expected):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={"PYTHONPATH": str(ROOT)} | given, capture_output=True, text=True
    )
    if done.stderr.strip() == "other":
        pytest.skip("another C library")
    assert done.stdout.strip() == expected, done.stderr


FREED = """
import platform
import torch
from clora.heap import keep_freed_memory
from clora.training.memory import free_memory
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) // 1024
if platform.libc_ver()[0] != "glibc":
    raise SystemExit("other")
keep_freed_memory()
held = [torch.ones(2 << 20) for _ in range(64)]
last = torch.ones(1000)
before = resident()
del held
kept = resident()
free_memory(torch.device("cpu"))
print(before - kept < 100, before - resident() > 400)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is of Linux")
def test_what_is_kept_counts_as_free_memory():
    done = subprocess.run([sys.executable, "-c", FREED], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.stderr.strip() == "other":
        pytest.skip("another C library")
    assert done.stdout.strip() == "True True", done.stderr
