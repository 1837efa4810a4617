"""Passes without gradients as CUDA graphs: each block of the transformer is captured once per kind of input and replayed.

A replay launches all kernels of a block by one call of the host. Graphs read and write fixed memory: inputs are copied into
buffers, which all blocks share, and outputs out of them. A graph computes every LoRA exactly for any ids: nothing is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from clora.bank.bank import AdapterBank
from clora.bank.compiled import repeated_blocks
from clora.bank.routing import RoutedPass
from clora.errors import CloraError

MAX_KINDS = 16
"""Graphs of a block; further kinds of inputs run without."""

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes the work of a function, which need not be done, and returns what does it again on the same memory."""


class CudaCapture:
    """Captures CUDA graphs, whose temporary memory they share: they are replayed one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay


class Kind(NamedTuple):
    """What a block's graphs of one kind share: how its output is built, and the memory that it is written to."""

    structure: Any
    outputs: list[Tensor]


class GraphedBlocks:
    """Runs blocks by graphs.

    Args:
        bank: on their transformer.
        capture: `CudaCapture`.
    """

    def __init__(self, bank: AdapterBank, capture: Capture):
        self._bank = bank
        self._capture = capture
        self._kinds: dict[nn.Module, dict[tuple, Kind]] = {}
        self._replays: dict[tuple, Callable[[], None]] = {}
        self._buffers: dict[tuple, Tensor] = {}
        self._passes: dict[tuple, RoutedPass] = {}
        self._copied: RoutedPass | None = None

    def __call__(self, block: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """``forward(*args, **kwargs)`` of a block; with gradients as it is."""
        if torch.is_grad_enabled() or self._bank.running is None:
            return forward(*args, **kwargs)
        routed, route = self._routed(self._bank.running)
        leaves, structure = tree_flatten((args, kwargs))
        layouts = [
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        key = (route, str(structure), *layouts)
        kinds = self._kinds.setdefault(block, {})
        with self._bank.resumed(routed):
            if key not in kinds and len(kinds) >= MAX_KINDS:
                return forward(*args, **kwargs)
            inputs = [
                self._buffer("input", i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)
            ]
            for buffer, leaf in zip(inputs, leaves, strict=True):
                if isinstance(leaf, Tensor):
                    buffer.copy_(leaf)
            own = tree_unflatten(inputs, structure)
            if key not in kinds:
                # The first pass compiles kernels and allots workspaces, which must not happen in a graph; so it has the
                # buffers' strides and alignment, on which kernels depend.
                results, of_output = tree_flatten(forward(*own[0], **own[1]))
                kinds[key] = Kind(of_output, [self._buffer("output", i, y) for i, y in enumerate(results)])
                return tree_unflatten([y.clone() for y in results], of_output)
            if (block, key) not in self._replays:
                self._replays[block, key] = self._captured(forward, own, kinds[key])
        self._replays[block, key]()
        return tree_unflatten([y.clone() for y in kinds[key].outputs], kinds[key].structure)

    def _captured(self, forward: Callable, inputs: tuple[tuple, dict], kind: Kind) -> Callable[[], None]:
        def compute() -> None:
            for buffer, y in zip(kind.outputs, tree_flatten(forward(*inputs[0], **inputs[1]))[0], strict=True):
                buffer.copy_(y)

        return self._capture(compute)

    def _routed(self, running: RoutedPass) -> tuple[RoutedPass, tuple]:
        """A pass on the same stacks that reads the ids from fixed memory, and its key."""
        key = (running.num_samples, *((id(stack.factors), id(stack.scale)) for stack in running.stacks))
        if key not in self._passes:
            stacks = [replace(stack, ids=stack.ids.clone()) for stack in running.stacks]
            self._passes[key] = replace(running, stacks=stacks, by_value=True)
        fixed = self._passes[key]
        if self._copied is not running:  # once for all blocks of a pass
            for stack, own in zip(fixed.stacks, running.stacks, strict=True):
                stack.ids.copy_(own.ids)
            self._copied = running
        return fixed, key

    def _buffer(self, role: str, position: int, like: Tensor) -> Tensor:
        """Memory that the blocks share for an input or output of this layout."""
        key = (role, position, like.shape, like.stride(), like.dtype, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(like)
        return self._buffers[key]


@contextmanager
def graphed_blocks(bank: AdapterBank, capture: Capture | None = None) -> Iterator[None]:
    """Inside, passes without gradients run the transformer's repeated blocks by CUDA graphs.

    Args:
        bank: on the transformer.
        capture: by default `CudaCapture`.

    Raises:
        CloraError: the bank is not on a CUDA GPU, LoRAs are paged, the transformer's weights are offloaded, or it names no
            repeated blocks.
    """
    blocks = repeated_blocks(bank.transformer)
    if capture is None:
        check_graphs(bank.transformer, bank.bytes().host > 0)
        capture = CudaCapture()
    run = GraphedBlocks(bank, capture)
    for block in blocks:
        block.forward = partial(run, block, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def check_graphs_on(device: torch.device) -> None:
    """Raises CloraError for a device that has no CUDA graphs."""
    if device.type != "cuda" or torch.version.hip:
        raise CloraError(f"train.cuda_graphs: expected an NVIDIA GPU, found {device}; switch it off")


def check_graphs(transformer: nn.Module, paged: bool) -> None:
    """Raises CloraError where a graph's memory would not be its own, or where there are no graphs.

    Args:
        transformer: with a bank or still without.
        paged: whether LoRAs wait in the host's memory.
    """
    check_graphs_on(transformer.device)
    if paged:
        raise CloraError(
            "train.cuda_graphs: expected all teachers on the GPU, found some paged; switch it off, or remove or raise "
            "train.teacher_memory_gb"
        )
    for name, module in transformer.named_modules():
        if hasattr(module, "_hf_hook"):
            raise CloraError(
                f"train.cuda_graphs: expected the transformer's weights on the GPU, found hooks of accelerate that move "
                f"those of {name or 'all of it'}; switch it off, or load the pipeline without offloading"
            )
