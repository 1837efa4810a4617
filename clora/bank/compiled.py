"""The blocks of a transformer that carries a bank, compiled by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from clora.bank.bank import AdapterBank
from clora.errors import CloraError

GRAPHS_PER_BLOCK = 24
"""Learning, simulation and scoring have graphs of their own: with and without padding, for the first size and for others."""


@contextmanager
def compiled_blocks(bank: AdapterBank, backend: str | Callable = "inductor") -> Iterator[None]:
    """Inside, the transformer's repeated blocks run compiled, forward and backward.

    A graph takes ids and factors as inputs, so that other routes, updated factors and, after the second, other sizes
    compile nothing again. Each block has graphs of its own, since its layers find their factors by name. A graph computes
    every LoRA exactly; nothing is merged.

    Args:
        bank: on the transformer.
        backend: of torch.compile.

    Raises:
        CloraError: the transformer names no repeated blocks.
    """
    blocks = repeated_blocks(bank.transformer)
    dynamo = torch._dynamo.config
    # PyTorch counts the graphs of all blocks together, since they share their code, and runs the rest uncompiled.
    most = max(dynamo.accumulated_recompile_limit, GRAPHS_PER_BLOCK * len(blocks))
    with dynamo.patch(recompile_limit=most, accumulated_recompile_limit=most):
        for block in blocks:
            block.compile(backend=backend)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """Returns the blocks that diffusers names as repeated, in order.

    Raises:
        CloraError: it names none.
    """
    names = getattr(transformer, "_repeated_blocks", None) or ()
    blocks = [module for module in transformer.modules() if type(module).__name__ in names]
    if not blocks:
        raise CloraError(
            f"{type(transformer).__name__} names no repeated blocks, which train.compile and train.cuda_graphs need; "
            "leave both off"
        )
    return blocks
