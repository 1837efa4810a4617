"""Gradient checkpointing of a transformer that carries a bank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch.utils.checkpoint import checkpoint

from clora.adapter_bank import AdapterBank


@contextmanager
def recomputed_blocks(bank: AdapterBank) -> Iterator[None]:
    """Inside, a pass that is differentiated keeps each block's input alone; the rest is computed again for the gradient.

    That happens after the pass, when nothing is routed any more: each block is computed again on the slots that its own
    pass was routed to. Passes without gradients are as ever.

    Raises:
        ValueError: the transformer's class does not support it.
    """

    def run(block, *inputs):
        routing = bank.routing
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), bank.route(routing.slots, routing.adapter_ids)),
        )

    bank.transformer.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        bank.transformer.disable_gradient_checkpointing()
