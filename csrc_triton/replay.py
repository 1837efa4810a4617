"""Calls that the host prepares once: what a call does is recorded per layout of its tensors, and replayed afterwards.

To find designs, tiles, grids, strides and compiled kernels takes the host longer than to launch them, and depends only on the
layouts of the tensors. So the first call of a layout becomes a `Tape`, its operations and launches in order, and later calls
replay the tape on their own tensors.

A function that `replayed` calls may branch only on layouts and on its other arguments. What it does to tensors, it does by
`do` and `launch`; the rest of it runs only while it is recorded. Nothing is kept of a call's tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from csrc_triton.registration import INTERPRETED

MAX_TAPES = 4096
"""Of a few kilobytes each; a training run with texts of many lengths has hundreds. When they are too many, all are dropped."""
ALIGNMENT = 16
"""Bytes, to which Triton's compiler specialises pointers; descriptors need it, too."""
BY_POINTER = not INTERPRETED and torch.version.hip is None
"""Launch compiled kernels past Triton's JIT: on NVIDIA GPUs it specialises on nothing of a tensor but dtype and alignment."""
enabled = True
"""Tests that watch single launches switch it off."""

_recording = threading.local()


class Tape:
    """The operations and launches of a call; tensors are numbered, its inputs first, then what operations return."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        self._tensors = list(inputs)
        self._steps: list[Callable[[list], None]] = []
        self._outputs: list[int] = []
        first = inputs[0]
        self._device = first.get_device() if first.is_cuda else None
        self.is_complete = True
        """False if a step used a tensor of unknown origin, so that there is nothing to replay."""
        self.choices: dict[tuple, bool] = {}
        """What the caller has chosen for calls of this signature, by what it depends on besides."""

    def add_operation(self, function: Callable, arguments: tuple, options: dict, result: Any) -> None:
        """Adds ``function(*arguments, **options)``; its tensors come before its other arguments."""
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        where, others = self._positions(arguments[:count]), arguments[count:]

        if options:
            function = partial(function, **options)
        if count == 1:
            (only,) = where
            self._steps.append(lambda tensors: tensors.append(function(tensors[only], *others)))
        else:
            self._steps.append(lambda tensors: tensors.append(function(*[tensors[i] for i in where], *others)))
        self._tensors.append(result)

    def add_launch(self, kernel, programs: int, arguments: tuple, constants: dict, compiled) -> None:
        """Adds a launch; its tensors come before its numbers. `compiled` is what the JIT has launched."""
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        where, numbers = self._positions(arguments[:count], as_pointers=True), arguments[count:]
        if not BY_POINTER:
            self._steps.append(lambda tensors: kernel[(programs,)](*[tensors[i] for i in where], *numbers, **constants))
            return
        # As JITFunction.run launches it: grid, stream, handles, no hooks of profilers, then all parameters in order, of which
        # the launcher takes a pointer as a number, too.
        run, handles = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
        rest = (*numbers, *[constants[name] for name in kernel.arg_names[len(arguments) :]])
        device, current_stream = self._device, triton.runtime.driver.active.get_current_stream

        def step(tensors: list) -> None:
            run(programs, 1, 1, current_stream(device), *handles, *[tensors[i].data_ptr() for i in where], *rest)

        self._steps.append(step)

    def end(self, outputs: Sequence[Tensor]) -> None:
        """Ends the recording, with the tensors that the call returns."""
        self._outputs = self._positions(outputs)
        self._tensors = []

    def replay(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Does the call on other tensors of the same layouts; returns its outputs."""
        if self._device is not None and self._device != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                return self.replay(inputs)
        tensors = [*inputs]
        for step in self._steps:
            step(tensors)
        return [tensors[i] for i in self._outputs]

    def _positions(self, tensors: Sequence[Tensor], as_pointers: bool = False) -> list[int]:
        """The numbers of tensors; for a kernel, which reads only its pointer, a view counts as the tensor it begins with."""
        return [self._position(tensor, as_pointers) for tensor in tensors]

    def _position(self, tensor: Tensor, as_pointer: bool) -> int:
        same = [i for i, known in enumerate(self._tensors) if known is tensor]
        if same or not as_pointer:
            self.is_complete &= bool(same)
            return same[0] if same else 0
        start = (tensor.data_ptr(), tensor.dtype)
        known = {
            id(t): i for i, t in enumerate(self._tensors) if isinstance(t, Tensor) and (t.data_ptr(), t.dtype) == start
        }
        # Of two that begin at one address only one is meant, and next time they may be at two.
        self.is_complete &= len(known) == 1
        return next(iter(known.values()), 0)


_tapes: dict[tuple, Tape] = {}


def signature(function: Callable, tensors: Sequence[Tensor | None], others: tuple) -> tuple:
    """Everything that a call's checks and its preparation look at; calls of one signature do the same.

    Args:
        function: as the module describes; returns tensors that are inputs or made by `do`.
        tensors: its arguments, the first not None.
        others: its further arguments, hashable.
    """
    learns = torch.is_grad_enabled()
    traits = [
        t
        if t is None
        # To hash strides takes the host long. Those of dimensions of size 1, which is_contiguous passes over, are never used.
        else (
            t.shape,
            t.is_contiguous() or t.stride(),
            t.dtype,
            t.device,
            t.data_ptr() % ALIGNMENT,
            learns and t.requires_grad,
        )
        for t in tensors
    ]
    autocast = torch.is_autocast_enabled("cuda" if tensors[0].is_cuda else "cpu")
    return (function, others, learns, autocast, *traits)


def recorded(signature: tuple) -> Tape | None:
    """The tape of calls of this signature."""
    return _tapes.get(signature) if enabled else None


def record(signature: tuple, function: Callable, others: tuple, tensors: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """``function(*tensors, *others)``, which becomes the tape of its signature. All tensors are on one device."""
    with torch.cuda.device_of(tensors[0]), set_wrap_triton_enabled(False):
        if not enabled:
            return function(*tensors, *others)
        # A tensor that is given twice becomes two objects: next time it may be two tensors.
        seen: set[int] = set()
        tensors = [t if t is None or id(t) not in seen and not seen.add(id(t)) else t.detach() for t in tensors]
        tape = _recording.tape = Tape(tensors)
        try:
            outputs = function(*tensors, *others)
        finally:
            _recording.tape = None
    tape.end(outputs)
    if tape.is_complete:
        if len(_tapes) >= MAX_TAPES:
            _tapes.clear()
        _tapes[signature] = tape
    return outputs


def replayed(function: Callable, tensors: Sequence[Tensor | None], *others) -> Sequence[Tensor]:
    """``function(*tensors, *others)``, prepared only if no call of its signature was."""
    own = signature(function, tensors, others)
    tape = recorded(own)
    return record(own, function, others, tensors) if tape is None else tape.replay(tensors)


def do(function: Callable, *arguments, **options) -> Any:
    """``function(*arguments, **options)``, a step of the call that is being recorded, if one is.

    Args:
        arguments: tensors first.
    """
    result = function(*arguments, **options)
    tape = getattr(_recording, "tape", None)
    if tape is not None:
        tape.add_operation(function, arguments, options, result)
    return result


def launch(kernel, programs: int, arguments: tuple, constants: dict, wrap: Callable) -> None:
    """Launches a kernel on a grid of programs, likewise.

    Args:
        arguments: tensors first, then numbers, in the kernel's order; its constants follow by name.
        wrap: `registration.wrap_triton`.
    """
    compiled = wrap(kernel)[(programs,)](*arguments, **constants)
    tape = getattr(_recording, "tape", None)
    if tape is not None:
        tape.add_launch(kernel, programs, arguments, constants, compiled)
