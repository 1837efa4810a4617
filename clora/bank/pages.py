"""Pages: many LoRAs on the host, a few of them in slots of a device's stack, the least recently used replaced first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from clora.bank.slots import Factors, fill, ranks_of, slot_dtype
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState

MIN_PAGES = 2
"""One in use and one being copied."""


def page_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], dtype: torch.dtype) -> int:
    """Returns the bytes of one slot of a bank.

    Args:
        shapes: module path to ``(out, in)`` (`clora.lora.layers.linear_shapes`).
        ranks: of each module that any LoRA changes, the highest rank among them (`module_ranks`).
        dtype: of the slots.
    """
    return sum(sum(shapes[module]) * rank for module, rank in ranks.items()) * dtype.itemsize


def module_ranks(loras: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Returns the highest rank of each module, from the module's rank in every LoRA (`ranks_of`)."""
    ranks: dict[str, int] = {}
    for lora in loras:
        for module, rank in lora.items():
            ranks[module] = max(rank, ranks.get(module, 0))
    return ranks


def pages_that_fit(budget_gb: float | None, one: int, count: int) -> int | None:
    """Returns the number of device pages under a budget.

    Args:
        budget_gb: ``train.teacher_memory_gb``.
        one: bytes of a page (`page_bytes`).
        count: the teachers.

    Returns:
        The pages; None if every teacher has a slot of its own.

    Raises:
        CloraError: the budget holds fewer than two teachers.
    """
    if budget_gb is None or count * one <= budget_gb * 1e9:
        return None
    pages = int(budget_gb * 1e9 // one)
    if pages < MIN_PAGES:
        raise CloraError(
            f"train.teacher_memory_gb: {budget_gb:g} GB hold {pages} teachers of {one / 1e9:.3g} GB, expected at least "
            f"{MIN_PAGES} (one in use, one on its way); set it to {MIN_PAGES * one / 1e9:.3g} or more"
        )
    return pages


def teacher_pages(
    budget_gb: float | None, transformer: nn.Module, states: Sequence[LoRAState], count: int | None = None
) -> int | None:
    """Returns the ``pages`` of a bank under a budget, as `pages_that_fit`.

    Args:
        budget_gb: ``train.teacher_memory_gb``.
        transformer: carries the bank.
        states: every LoRA of the bank; the highest ranks among them are those of a slot.
        count: the teachers among them; all by default.

    Raises:
        CloraError: the budget holds fewer than two teachers.
    """
    # A page holds any of the LoRAs in turn, so it has the highest rank of each module.
    ranks = module_ranks([ranks_of(state) for state in states])
    one = page_bytes(linear_shapes(transformer), ranks, slot_dtype(transformer))
    return pages_that_fit(budget_gb, one, len(states) if count is None else count)


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
        stacks: per module the device's pages ``(A [P, R, K], B [P, N, R])``.
        loras: the LoRAs, each from `host_factors`.
    """

    def __init__(self, stacks: Mapping[str, Factors], loras: Sequence[Mapping[str, Factors]]):
        self.loras = loras
        self._stacks = stacks
        first = next(iter(stacks.values()))[0]
        self.count = len(first)
        self._device = first.device
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None
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
                fill({module: (a[page], b[page]) for module, (a, b) in self._stacks.items()}, self.loras[lora])
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
