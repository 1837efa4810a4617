"""Time of the host per call of the multi-adapter linear layer on Triton: checks, routing, tiles, launches. Needs no GPU.

`python -m bench.host` compiles the kernels for sm_90 and calls the ops with tensors on the CPU. Everything runs as on a GPU
but what needs one, which is replaced:

- Triton's driver (`StubDriver`): kernels are not loaded, the launcher (a little Python, then C) does nothing, current device
  and stream are constants. What JITFunction does before it (binding, specialisation, cache) is real.
- the tests whether the tensors are on a GPU and on the current one.

Allocations and the base layer's `F.linear` are those of the CPU, on tensors of one token. The base layer is timed by itself
and subtracted: any other way to add adapters has it too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget

from clora import ops
from csrc_triton.multi_lora import checks

SHARED_MEMORY = 232_448
"""Of one program on sm_90, in bytes."""
CALLS, ROUNDS = 200, 40
GOAL_US = 20.0
"""For one layer without gradients, the base layer not counted."""


class StubDriver:
    """Stands in for Triton's CUDA driver, as far as compiling and launching ask for it."""

    def __init__(self):
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),  # module, function, registers, spills, threads
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
            unload_module=lambda module: None,
        )
        self.launcher_cls = lambda source, metadata: self._launch

    @staticmethod
    def _launch(
        x: int, y: int, z: int, stream: int, function, metadata, launch_metadata, enter, leave, *arguments
    ) -> None:
        """Takes what Triton's launchers do."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend_gpu() -> None:
    """Makes this process take tensors on the CPU for tensors on an sm_90 GPU."""
    triton.runtime.driver.set_active(StubDriver())
    ops._obstacle = lambda device, explicit: None
    checks.INTERPRETED = True


def cases(adapters: int = 4, samples: int = 4, width: int = 64, rank: int = 16) -> dict[str, Callable[[], object]]:
    """The calls that are timed; what they compute does not matter, only the host's way through them."""
    x = torch.randn(samples, 1, width)
    weight, bias = torch.randn(width, width), torch.randn(width)
    a, b = torch.randn(adapters, rank, width), torch.randn(adapters, width, rank)
    scale, ids = torch.ones(adapters), torch.arange(samples) % adapters
    trained = [factor.clone().requires_grad_() for factor in (a, b)]
    upstream = torch.randn(samples, 1, width)

    @torch.no_grad()
    def base() -> None:
        F.linear(x, weight, bias)

    @torch.no_grad()
    def one_layer() -> None:
        ops.multi_lora_linear(x, weight, bias, a, b, scale, ids)

    @torch.no_grad()
    def three_layers() -> None:
        ops.multi_lora_linears(x, [(weight, bias, a, b)] * 3, scale, ids)

    def student() -> torch.Tensor:
        return ops.multi_lora_linear(x, weight, bias, *trained, scale, ids)

    def student_gradient() -> None:
        torch.autograd.grad(student(), trained, upstream)

    return {
        "base": base,
        "one layer": one_layer,
        "q, k, v": three_layers,
        "student": student,
        "student, forward and backward": student_gradient,
    }


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians of the process's own time per call; the calls take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            begun = time.process_time_ns()
            for _ in range(CALLS):
                call()
            if turn:  # the first round compiles
                samples[name].append((time.process_time_ns() - begun) / CALLS / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls each (default: {ROUNDS})")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    pretend_gpu()
    found = microseconds(cases(), rounds)
    print(f"torch {torch.__version__}, Triton {triton.__version__}, us of the host per call, up to Triton's launcher")
    base = found.pop("base")
    print(f"{'base layer (F.linear)':32}{base:8.1f}")
    for name, value in found.items():
        layers = 3 if name == "q, k, v" else 1
        print(f"{name:32}{value:8.1f}   without the base: {value - layers * base:.1f}")


if __name__ == "__main__":
    main()
