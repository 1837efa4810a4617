"""Time of the host per call of the multi-adapter linear layer on Triton: checks, routing, tiles, launches. Needs no GPU.

`python -m bench.host` compiles the kernels for sm_90 and calls the ops with tensors on the CPU. Everything runs as on a GPU
but what needs one, which is replaced:

- Triton's driver (`StubDriver`): kernels are not loaded, the launcher (a little Python, then C) does nothing, current device
  and stream are constants. What JITFunction does before it (binding, specialisation, cache) is real.
- the tests whether the tensors are on a GPU and on the current one.

Allocations and the base layer's product are those of the CPU, on tensors of one token. Design split contains the product, which
is timed by itself and subtracted: any other way to add adapters has it too. Design fused has only kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget

from bench.arguments import Parser, run, whole
from clora import ops
from csrc_triton.multi_lora import checks, designs, launch, passes
from csrc_triton.multi_lora.designs import gpu_device
from csrc_triton.multi_lora.tiles import Machine

SHARED_MEMORY = 232_448
"""Of one program on sm_90, in bytes."""
HOPPER = gpu_device((9, 0), triton.__version__)
CALLS, ROUNDS = 200, 40
BASE = "base layer (F.linear)"
STUDENT = "student's layer"
"""Calls of this name learn. The others run without gradients, which a pass of a transformer switches off once."""


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
    launch.machine_of = lambda device: Machine(SHARED_MEMORY, descriptors=True, multiprocessors=132)
    designs.device_of = passes.device_of = lambda device: HOPPER
    checks.INTERPRETED = True


def cases(adapters: int = 4, samples: int = 4, width: int = 64, rank: int = 16) -> dict[str, Callable[[], object]]:
    """The calls that are timed; what they compute does not matter, only the host's way through them."""
    x = torch.randn(samples, 1, width)
    weight, bias = torch.randn(width, width), torch.randn(width)
    a, b = torch.randn(adapters, rank, width), torch.randn(adapters, width, rank)
    scale, ids = torch.ones(adapters), torch.arange(samples) % adapters
    runs, strengths = ops.runs_of(ids.tolist()), (0.1,) * adapters
    trained = [factor.clone().requires_grad_() for factor in (a, b)]
    upstream = torch.randn(samples, 1, width)

    layer = (weight, bias, a, b)
    learning = (weight, bias, *trained)

    def student(design: str) -> torch.Tensor:
        return ops.multi_lora_linear(x, *learning, scale, ids, design=design)

    def gradients(design: str) -> None:
        torch.autograd.grad(student(design), trained, upstream)

    calls: dict[str, Callable[[], object]] = {BASE: lambda: F.linear(x, weight, bias)}
    for design in ("fused", "split"):
        calls[f"{design}: one layer"] = partial(ops.multi_lora_linear, x, *layer, scale, ids, design=design)
        calls[f"{design}: q, k, v"] = partial(ops.multi_lora_linears, x, [layer] * 3, scale, ids, design=design)
        calls[f"{design}: {STUDENT}"] = partial(student, design)
        calls[f"{design}: {STUDENT} and its gradients"] = partial(gradients, design)
    chosen = passes.design_of(x, weight, a, None)
    for name, count in {"one layer": 1, "q, k, v": 3}.items():
        routed = {"runs": runs, "strengths": [strengths] * count, **ops.chosen()}
        as_routed = partial(ops.multi_lora_linears, x, [layer] * count, scale, ids, **routed)
        calls[f"{chosen}: {name}, as the bank calls it"] = as_routed
    return calls


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians of the process's own time per call; the calls take turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            with torch.set_grad_enabled(STUDENT in name):
                begun = time.process_time_ns()
                for _ in range(CALLS):
                    call()
                spent = time.process_time_ns() - begun
            if turn:  # the first round compiles
                samples[name].append(spent / CALLS / 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all calls and prints the table."""
    parser = Parser("bench.host", __doc__.splitlines()[0])
    parser.add_argument("--rounds", type=whole(), default=ROUNDS, help=f"of {CALLS} calls each (default: {ROUNDS})")
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    pretend_gpu()
    found = microseconds(cases(), rounds)
    print(f"torch {torch.__version__}, Triton {triton.__version__}, us of the host per call, up to Triton's launcher")
    for name, value in found.items():
        layers = 3 if "q, k, v" in name else 1
        beside = f"   beside the base: {value - layers * found[BASE]:6.1f}" if name.startswith("split") else ""
        print(f"{name:45}{value:8.1f}{beside}")
    return 0


if __name__ == "__main__":
    run(main)
