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
from typing import Any

import torch
from torch import Tensor
from torch._library.triton import set_wrap_triton_enabled

from csrc_triton.registration import INTERPRETED

MAX_KEPT = 4096
"""Layouts of which a tape is kept, a few kilobytes each; a training run with texts of many lengths has hundreds."""
ALIGNMENT = 16
"""Bytes, to which Triton's compiler specialises pointers; descriptors need it, too."""
BY_POINTER = not INTERPRETED and torch.version.hip is None
"""Launch compiled kernels past Triton's JIT: on NVIDIA GPUs it specialises on nothing of a tensor but dtype and alignment."""
enabled = True
"""Tests that watch single launches switch it off."""

_recording = threading.local()


class Kept(dict):
    """What is known by the layouts of a call; when it is full, all of it is dropped."""

    def keep(self, key: tuple, value: Any) -> None:
        if len(self) >= MAX_KEPT:
            self.clear()
        self[key] = value


class Tape:
    """The operations and launches of a call; tensors are numbered, its inputs first, then what operations return."""

    def __init__(self, inputs: Sequence[Tensor | None]):
        self._tensors = list(inputs)
        self._steps: list[Callable[[list], None]] = []
        self._outputs: list[int] = []
        self.is_complete = True
        """False if a step used a tensor of unknown origin, so that there is nothing to replay."""

    def add_operation(self, function: Callable, arguments: tuple, options: dict, result: Any) -> None:
        """Adds ``function(*arguments, **options)``; its tensors come before its other arguments."""
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        where, others = self._positions(arguments[:count]), arguments[count:]

        def step(tensors: list) -> None:
            tensors.append(function(*[tensors[i] for i in where], *others, **options))

        self._steps.append(step)
        self._tensors.append(result)

    def add_launch(self, kernel, programs: int, arguments: tuple, constants: dict, compiled) -> None:
        """Adds a launch; its tensors come before its numbers. `compiled` is what the JIT has launched."""
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        where, numbers = self._positions(arguments[:count], as_pointers=True), arguments[count:]
        if not BY_POINTER:
            self._steps.append(lambda tensors: kernel[(programs,)](*[tensors[i] for i in where], *numbers, **constants))
            return
        # A compiled kernel takes all parameters in order. The launcher takes a pointer as a number, too.
        run = compiled[(programs, 1, 1)]
        rest = (*numbers, *[constants[name] for name in kernel.arg_names[len(arguments) :]])
        self._steps.append(lambda tensors: run(*[tensors[i].data_ptr() for i in where], *rest))

    def end(self, outputs: Sequence[Tensor]) -> None:
        """Ends the recording, with the tensors that the call returns."""
        self._outputs = self._positions(outputs)
        self._tensors = []

    def replay(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Does the call on other tensors of the same layouts; returns its outputs."""
        tensors = list(inputs)
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


_tapes = Kept()


def replayed(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor | None], **others) -> Sequence[Tensor]:
    """``function(*tensors, **others)``, whose preparation is done once per layout of the tensors.

    Args:
        function: as the module describes; returns tensors that are inputs or made by `do`.
        tensors: all on the device of the first.
        others: hashable.
    """
    first = tensors[0]
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.get_device()):
            return replayed(function, tensors, **others)
    layouts = [t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % ALIGNMENT) for t in tensors]
    key = (function, *others.values(), first.device, *layouts)
    tape = _tapes.get(key) if enabled else None
    if tape is not None:
        return tape.replay(tensors)
    with set_wrap_triton_enabled(False):
        return _record(key, function, tensors, others) if enabled else function(*tensors, **others)


def _record(key: tuple, function: Callable, tensors: Sequence[Tensor | None], others: dict) -> Sequence[Tensor]:
    # A tensor that is given twice becomes two objects: next time it may be two tensors.
    seen: set[int] = set()
    tensors = [t if t is None or id(t) not in seen and not seen.add(id(t)) else t.detach() for t in tensors]
    tape = _recording.tape = Tape(tensors)
    try:
        outputs = function(*tensors, **others)
    finally:
        _recording.tape = None
    tape.end(outputs)
    if tape.is_complete:
        _tapes.keep(key, tape)
    return outputs


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
