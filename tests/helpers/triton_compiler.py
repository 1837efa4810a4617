"""Compiles the launches of a launch function for GPUs that are not there, and reads the result.

A launch function runs on meta tensors with `wrap_triton` replaced by a recorder; each recorded launch is compiled from its
own arguments, as Triton would specialise them, by a copy of the kernels that is not interpreted.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def has_tools(target: str) -> bool:
    """Whether Triton can compile for one of `TARGETS`: 3.4 takes AMD's linker from an installed ROCm."""
    find = getattr(triton.compiler.make_backend(TARGETS[target]), "path_to_rocm_lld", None)
    try:
        return find is None or bool(find())
    except Exception:  # what it raises
        return False


@dataclass(frozen=True)
class Launch:
    """One recorded launch: `args` and `options` as the launch function passed them."""

    kernel: str
    grid: tuple[int, ...]
    args: dict
    options: dict


@dataclass(frozen=True)
class Resources:
    """Resources of one program of a compiled kernel: registers per thread, bytes of stack, bytes of shared memory."""

    registers: int
    stack: int
    shared: int


class Recorder:
    """Stands in for `wrap_triton`: keeps the launches instead of doing them."""

    def __init__(self):
        self.launches = []

    def __call__(self, kernel):
        self._kernel = kernel
        return self

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = [*self._kernel.arg_names[: len(args)]]
            given = dict(zip(names, args, strict=True)) | kwargs
            options = {name: given.pop(name) for name in OPTIONS if name in given}
            self.launches.append(Launch(self._kernel.__name__, grid, given, options))

        return launch


def uninterpreted(path: Path, monkeypatch):
    """The kernels of a file as a fresh module that Triton compiles even where it was imported to interpret."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_compiled", path)
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def compile_launch(kernels, launch: Launch, target: str):
    """Compiles a recorded launch for one of `TARGETS`."""
    kernel = getattr(kernels, launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = launch.args[parameter.name]
        signature[parameter.name], constant, divisible = _specialise(value, parameter)
        if constant:
            constants[(i,)] = value
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def _specialise(value, parameter) -> tuple[str, bool, bool]:
    """(type, whether the value is compiled in, whether it is known to be a multiple of 16), as Triton's JIT does."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], False, value.storage_offset() * value.element_size() % 16 == 0
    if parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
        return "constexpr", True, False
    integer = "i32" if -(2**31) <= value < 2**31 else "i64"
    return integer, False, value % 16 == 0 and not parameter.do_not_specialize


def resources(compiled, folder: Path) -> Resources:
    """Reads the machine code of an NVIDIA kernel."""
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(read["REG"], read["STACK"] + read["LOCAL"], compiled.metadata.shared)
