"""Pages: many LoRAs on the host, a few of them in slots of a device's stack, the least recently used replaced first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from clora.bank.slots import Factors, fill, slot_dtype
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState

MIN_PAGES = 2
"""One in use and one on its way."""


def page_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes of one slot of a bank.

    Args:
        shapes: module path to ``(out, in)`` (`clora.lora.layers.linear_shapes`).
        ranks: of each module that any LoRA changes, the highest rank among them (`module_ranks`).
        dtype: of the slots, the transformer's.
    """
    return sum(sum(shapes[module]) * rank for module, rank in ranks.items()) * dtype.itemsize


def module_ranks(loras: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The highest rank of each module, from module path to rank of every LoRA."""
    ranks: dict[str, int] = {}
    for lora in loras:
        for module, rank in lora.items():
            ranks[module] = max(rank, ranks.get(module, 0))
    return ranks


def pages_that_fit(budget_gb: float | None, one: int, count: int) -> int | None:
    """Device pages for ``count`` teachers of ``one`` byte count each; None: all have a slot of their own.

    Raises:
        CloraError: the budget holds fewer than two.
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
    """The bank's ``pages`` under a budget.

    Args:
        budget_gb: ``train.teacher_memory_gb``.
        transformer: what carries the bank.
        states: every LoRA of the bank; the highest ranks among them are those of a slot.
        count: the teachers among them; all by default.

    Raises:
        CloraError: the budget holds fewer than two teachers.
    """
    ranks = module_ranks([{m: lora.rank for m, lora in state.modules.items()} for state in states])
    one = page_bytes(linear_shapes(transformer), ranks, slot_dtype(transformer))
    return pages_that_fit(budget_gb, one, len(states) if count is None else count)


def host_factors(factors: Mapping[str, Factors], dtype: torch.dtype, pinned: bool) -> dict[str, Factors]:
    """Factors on the host in the slots' dtype and their own ranks; pinned so that a GPU copies them on its own."""

    def host(factor: Tensor) -> Tensor:
        factor = factor.detach().to("cpu", dtype).contiguous()
        return factor.pin_memory() if pinned else factor

    return {module: (host(a), host(b)) for module, (a, b) in factors.items()}


class Pages:
    """Which LoRA is in which page, and the copies between.

    On a GPU a copy runs on a stream of its own. It waits for what was enqueued when it was asked for, so that no pass
    still reads the page; a pass waits for the copies when it asks for its pages. The host waits for nothing.

    Args:
        stacks: per module the device's pages ``(A [P, R, K], B [P, N, R])``.
        loras: all of them, from `host_factors`.
    """

    def __init__(self, stacks: Mapping[str, Factors], loras: Sequence[Mapping[str, Factors]]):
        self.loras = loras
        self._stacks = stacks
        first = next(iter(stacks.values()))[0]
        self.count = len(first)
        self._device = first.device
        self._stream = torch.cuda.Stream(first.device) if first.is_cuda else None
        self._page: dict[int, int] = {}  # LoRA to page, the least recently used first
        self._held: set[int] = set()

    def fetch(self, wanted: Sequence[int]) -> None:
        """Begins to copy these LoRAs, as far as there are pages that no `held` block and none of them needs."""
        wanted = list(dict.fromkeys(wanted))[: self.count]
        missing = [lora for lora in wanted if lora not in self._page]
        if missing and self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for lora, page in zip(missing, self._free(len(missing), {*wanted, *self._held}), strict=False):
                fill({module: (a[page], b[page]) for module, (a, b) in self._stacks.items()}, self.loras[lora])
                self._page[lora] = page
        for lora in wanted:
            if lora in self._page:
                self._page[lora] = self._page.pop(lora)  # now the most recently used

    @contextmanager
    def held(self, wanted: Sequence[int]) -> Iterator[dict[int, int]]:
        """LoRA to page of these, at most ``count``; inside, no `fetch` takes their pages."""
        self.fetch(wanted)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        before, self._held = self._held, self._held | set(wanted)
        try:
            yield {lora: self._page[lora] for lora in wanted}
        finally:
            self._held = before

    def _free(self, count: int, kept: set[int]) -> list[int]:
        """Up to ``count`` pages: empty ones, then those of the least recently used LoRAs but ``kept``, which leave."""
        used = set(self._page.values())
        pages = [page for page in range(self.count) if page not in used][:count]
        for lora in [lora for lora in self._page if lora not in kept][: count - len(pages)]:
            pages.append(self._page.pop(lora))
        return pages
