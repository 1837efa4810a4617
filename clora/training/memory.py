"""The rows of a pass with gradients where the config leaves them to clora: enough to fill the products, if they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from clora.heap import return_freed_memory

FILLING_TOKENS = {"cpu": 640, "cuda": 8192}
"""Tokens from which a product takes hardly less time for each. On a CPU measured with the studio (`python -m bench.update`):
3 rows of 192 tokens at once need an eighth of the memory of all 22 and a sixth more time, 4 rows a sixth of the memory and a
twelfth more time: 1.6 times the memory of three copies of the model. On a GPU a prediction."""
SHARE = 0.5
"""Of the free memory, for the graphs of these rows: scoring needs some, too, and other processes may."""


def rows_that_fit(tokens: int, row_bytes: int, free: int | None, device_type: str) -> int:
    """Returns how many rows fill the products, or fewer where the memory does not suffice; at least one.

    Args:
        tokens: of a row.
        row_bytes: that a row's graph keeps.
        free: bytes of the device; None for unknown, which bounds nothing.
        device_type: as torch names it.
    """
    filling = FILLING_TOKENS.get(device_type, FILLING_TOKENS["cuda"]) // tokens
    fitting = filling if free is None else int(SHARE * free) // max(row_bytes, 1)
    return max(1, min(filling, fitting))


def free_memory(device: torch.device) -> int | None:
    """Returns the free bytes of a device, for the CPU the machine's; None where the system does not report them."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    return_freed_memory()  # it is free for the next pass, but the system would count it as used
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def kept_bytes(run: Callable[[], Tensor], without: Iterable[Tensor]) -> int:
    """Runs one pass with gradient and returns the bytes that its graph keeps beside those of ``without``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor  # alive until the pass is dropped, so that no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # held while the bytes are counted: with it its graph would go
    for tensor in without:
        kept.pop(tensor.untyped_storage()._cdata, None)
    del output
    return sum(kept.values())
