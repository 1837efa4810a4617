"""Keeps the C library from handing memory back between the passes of a training step, only to ask for it again."""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h>; not in Python's standard library.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1  # bytes, the most that mallopt takes
LARGEST = 32 << 20  # bytes, likewise, for a block of the heap; larger ones are returned when they are freed


def keep_freed_memory() -> None:
    """Lets glibc reuse what tensors of up to 32 MiB have freed, up to 2 GiB, unless the user has set its allocator.

    By its defaults glibc moves the bound between heap and mapped blocks while the program runs, which leaves holes: a
    matching update of the studio with 3 rows a pass took 98 and 106 MiB so, and 75 and 77 with these. Other C libraries are
    left as they are.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if not is_set and (library := _glibc()) is not None:
        library.mallopt(MMAP_THRESHOLD, LARGEST)
        library.mallopt(TRIM_THRESHOLD, KEPT)


def return_freed_memory() -> None:
    """Hands back what is kept, so that the system counts it as free."""
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Returns the process's C library if it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
