"""Gradient checkpointing of a transformer that carries a bank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from clora.bank.bank import AdapterBank


@contextmanager
def recomputed_blocks(bank: AdapterBank) -> Iterator[None]:
    """Inside, a pass that is differentiated keeps each block's input alone; the rest is computed again for the gradient.

    That happens after the pass, when nothing is routed any more: each block is computed again on the slots that its own
    pass was routed to. Passes without gradients are as ever. Blocks may be compiled; a transformer that is compiled whole
    needs `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`.

    Raises:
        ValueError: the transformer's class does not support it.
    """

    def run(block, *inputs):
        if torch.compiler.is_compiling():  # what is computed again is part of a graph, which has its slots as inputs
            return checkpoint(block, *inputs, use_reentrant=False)
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
