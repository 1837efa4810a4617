"""Pages: many LoRAs on the host, a few of them on the device, the least recently used replaced first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from clora.bank.slots import Factors, Stack, fill, module_ranks, ranks_of, slot_dtype, slot_rank, stacked
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState

MIN_PAGES = 2
"""One in use and one being copied."""


def stack_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], dtype: torch.dtype) -> int:
    """Returns the bytes of one LoRA of a stack.

    Args:
        shapes: module path to ``(out, in)`` (`clora.lora.layers.linear_shapes`).
        ranks: of the stack's modules; counted as the slots have them (`slot_rank`).
        dtype: of the factors.
    """
    return sum(sum(shapes[module]) * slot_rank(rank, dtype) for module, rank in ranks.items()) * dtype.itemsize


def resident_bytes(
    shapes: Mapping[str, tuple[int, int]], loras: Sequence[Mapping[str, int]], dtype: torch.dtype
) -> int:
    """Returns the bytes of LoRAs that all stay on the device.

    Args:
        shapes, dtype: as in `stack_bytes`.
        loras: the module's rank in every LoRA (`ranks_of`).
    """
    total = 0
    for members in stacked(loras):
        ranks = module_ranks([loras[i] for i in members])
        total += len(members) * stack_bytes(shapes, ranks, dtype)
    return total


def pages_that_fit(
    budget_gb: float | None,
    shapes: Mapping[str, tuple[int, int]],
    loras: Sequence[Mapping[str, int]],
    dtype: torch.dtype,
) -> int | None:
    """Returns the number of device pages under a budget.

    Args:
        budget_gb: ``train.teacher_memory_gb``.
        shapes, loras, dtype: as in `resident_bytes`, of the teachers.

    Returns:
        The pages; None if every teacher has a slot of its own.

    Raises:
        CloraError: the budget holds fewer than two teachers.
    """
    if budget_gb is None or resident_bytes(shapes, loras, dtype) <= budget_gb * 1e9:
        return None
    # A page holds any of them in turn, so it has the highest rank of each module.
    one = stack_bytes(shapes, module_ranks(loras), dtype)
    pages = int(budget_gb * 1e9 // one)
    if pages < MIN_PAGES:
        raise CloraError(
            f"train.teacher_memory_gb: {budget_gb:g} GB hold {pages} teachers of {one / 1e9:.3g} GB, expected at least "
            f"{MIN_PAGES} (one in use, one on its way); set it to {MIN_PAGES * one / 1e9:.3g} or more"
        )
    return pages


def teacher_pages(budget_gb: float | None, transformer: nn.Module, teachers: Sequence[LoRAState]) -> int | None:
    """Returns the ``pages`` of a bank under a budget, as `pages_that_fit`.

    Args:
        budget_gb: ``train.teacher_memory_gb``.
        transformer: carries the bank.
        teachers: of the bank.

    Raises:
        CloraError: the budget holds fewer than two teachers.
    """
    ranks = [ranks_of(state) for state in teachers]
    return pages_that_fit(budget_gb, linear_shapes(transformer), ranks, slot_dtype(transformer))


def host_factors(factors: Mapping[str, Factors], dtype: torch.dtype, pinned: bool) -> dict[str, Factors]:
    """Returns factors on the host in the slots' dtype and their own ranks; a GPU copies pinned ones by itself."""

    def host(factor: Tensor) -> Tensor:
        factor = factor.detach().to("cpu", dtype).contiguous()
        return factor.pin_memory() if pinned else factor

    return {module: (host(a), host(b)) for module, (a, b) in factors.items()}


class Pages:
    """Holds all paged LoRAs on the host and copies of a few of them in the device's pages.

    On a GPU a copy runs on a stream of its own. It waits for the work that was enqueued when it was asked for, so that no
    pass still reads the page. A pass waits for the copies when it asks for its pages. The host waits for neither.

    Args:
        views: for each LoRA the device's P pages as it sees them: a stack of its own layers and ranks.
        loras: the LoRAs, each from `host_factors`.
        count: P.
        device: that of the pages.
    """

    def __init__(
        self, views: Sequence[Stack], loras: Sequence[Mapping[str, Factors]], count: int, device: torch.device
    ):
        self.loras = loras
        self.count = count
        self._views = views
        self._device = device
        self._stream = torch.cuda.Stream(device) if count and device.type == "cuda" else None
        # LoRA to page. The order is that of use, the least recently used first: a dict keeps the order of insertion.
        self._page: dict[int, int] = {}
        self._held: set[int] = set()

    def fetch(self, wanted: Sequence[int]) -> None:
        """Begins to copy these LoRAs to pages, as far as there are any that neither they nor a `held` block need."""
        wanted = list(dict.fromkeys(wanted))[: self.count]
        missing = [lora for lora in wanted if lora not in self._page]
        if missing and self._stream is not None:
            # The passes so far may still read the pages that are about to be overwritten.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for lora, page in zip(missing, self._free(len(missing), {*wanted, *self._held}), strict=False):
                fill(self._views[lora].row(page), self.loras[lora])
                self._page[lora] = page
        for lora in wanted:
            if lora in self._page:
                # Moves it to the end: now it is the most recently used.
                self._page[lora] = self._page.pop(lora)

    @contextmanager
    def held(self, wanted: Sequence[int]) -> Iterator[dict[int, int]]:
        """Yields the pages of these LoRAs, at most ``count``, by LoRA; inside, no `fetch` takes them."""
        self.fetch(wanted)
        if self._stream is not None:
            # The pass that follows reads the pages, so it must come after the copies.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        before = self._held
        self._held = before | set(wanted)
        try:
            yield {lora: self._page[lora] for lora in wanted}
        finally:
            self._held = before

    def _free(self, count: int, kept: set[int]) -> list[int]:
        """Frees up to ``count`` pages: empty ones first, then those of the least recently used LoRAs not in ``kept``."""
        used = set(self._page.values())
        pages = [page for page in range(self.count) if page not in used][:count]
        for lora in [lora for lora in self._page if lora not in kept][: count - len(pages)]:
            pages.append(self._page.pop(lora))
        return pages
