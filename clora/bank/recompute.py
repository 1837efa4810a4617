"""Gradient checkpointing of a transformer that carries a bank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.checkpoint import checkpoint

from clora.bank.bank import AdapterBank


@contextmanager
def recomputed_blocks(bank: AdapterBank) -> Iterator[None]:
    """Inside, a differentiated pass keeps only the input of each block; the rest is computed again for the gradient.

    By then nothing is routed any more, so each block is computed again on the slots of its own pass. Passes without
    gradients do not change. Blocks may be compiled. A transformer that is compiled whole needs
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint`.

    Raises:
        ValueError: the transformer's class does not support it.
    """

    def run(block, *inputs):
        # A graph has the slots among its inputs, also where it computes a block again.
        if torch.compiler.is_compiling():
            return checkpoint(block, *inputs, use_reentrant=False)
        running = bank.running
        return checkpoint(
            block,
            *inputs,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), bank.resumed(running)),
        )

    bank.transformer.enable_gradient_checkpointing(run)
    try:
        yield
    finally:
        bank.transformer.disable_gradient_checkpointing()
