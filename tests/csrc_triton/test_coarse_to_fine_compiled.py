"""The loss's kernels compiled for GPUs that are not there, and as torch.compile sees them.

Both need kernels that are not interpreted, in a process of their own: this file run as a script, with "few" or "rest" as
its argument.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("partials_kernel", "finish_kernel")
SHAPES = {  # name: (rows, scored, elements per row, dtype)
    "aligned": (64, 40, 16 * 128 * 128, torch.bfloat16),
    "several_tiles": (24, 16, 8 * 16 * 128 * 128, torch.float32),
    "odd": (3, 2, 262_145, torch.float32),
    "one_element": (1, 1, 1, torch.float16),
}
FEW = "aligned"
"""The shape of the fast tests; those of the others are slow."""
NVIDIA = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(scope="module")
def found(triton_cache):
    """Returns found("few") or found("rest"): the printed result of this file run as a script."""
    pytest.importorskip("triton")

    @cache
    def run(which):
        folder = {"TRITON_CACHE_DIR": str(triton_cache)}
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        command = [sys.executable, __file__, which]
        out = subprocess.run(command, env=inherited | folder | path, capture_output=True, text=True, timeout=600)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout.splitlines()[-1])

    return run


@pytest.fixture
def code_of(found):
    def of(shape, kernel, target):
        code = found("few" if shape == FEW else "rest")["code"][shape][kernel]
        return code[target] if target in code else pytest.skip(f"this Triton lacks the linker of {target}")

    return of


each_target = pytest.mark.parametrize("target", [*NVIDIA, "gfx942"])
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_shape = pytest.mark.parametrize(
    "shape", [FEW, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES if shape != FEW)]
)


@each_target
@each_kernel
@each_shape
def test_nothing_spills(code_of, shape, kernel, target):
    code = code_of(shape, kernel, target)
    assert code["spilled"] == 0
    assert code["shared"] <= 16 * 1024, "far below every GPU's 48 KiB or more"


@each_kernel
@each_shape
def test_no_atomics_no_fp64_and_no_lost_nan(code_of, shape, kernel):
    for target in NVIDIA:
        code = code_of(shape, kernel, target)
        assert not code["atomics"], "the order of atomic additions is not fixed"
        assert not code["fp64"], "slow, and nothing in these kernels needs it"
        assert not code["nan_lost"], "a maximum of NaN and a number is the number; in the interpreter it is NaN"


@each_kernel
@each_shape
def test_rows_and_chunks_are_addressed_in_64_bits(code_of, shape, kernel):
    """Every pointer that moves by a scalar (row, chunk) moves by an i64; the 32-bit tiles lie within a chunk."""
    moves = code_of(shape, kernel, "sm_90")["scalar_moves"]
    assert moves
    assert set(moves) == {"i64"}


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize(("kernel", "loads"), [("partials_kernel", 8), ("finish_kernel", 4)])
def test_aligned_rows_are_read_16_bytes_at_a_time(code_of, kernel, loads, target):
    """8 tensors of bf16, one load each; then fp32: two partial sums, a row per warp, and two loads of the direction."""
    assert code_of("aligned", kernel, target)["wide_loads"] == loads


def test_torch_compile_sees_the_kernels_and_what_they_write(found):
    forward, backward = found("few")["graphs"]
    outputs = ["p_loss", "p_terms", "p_gradient_norm", "p_nonfinite", "p_gradient"]
    assert forward["kernels"] == [["p_direction", "p_distance", "p_square"], outputs]
    assert backward["kernels"] == []
    free = {"aten.empty.memory_format", "aten.sym_size.int", "aten.detach.default"}
    assert set(forward["other"]) <= free | {"aten.mul.Tensor"}
    assert backward["other"].count("aten.mul.Tensor") == 2  # the loss is doubled; upstream times the gradient
    assert set(backward["other"]) <= free | {"aten.mul.Tensor"}


def compiled_kernels(shapes):
    """{shape: {kernel: {target: facts}}} of every launch that the op does for these of `SHAPES`."""
    from helpers import triton_compiler

    from csrc_triton.coarse_to_fine import kernels, launch

    found = {}
    for name in shapes:
        launch.wrap_triton = recorder = triton_compiler.Recorder()
        launch_on_meta(launch, *SHAPES[name])
        found[name] = {
            recorded.kernel: {
                target: facts(triton_compiler, triton_compiler.compile_launch(kernels, recorded, target))
                for target in filter(triton_compiler.has_tools, triton_compiler.TARGETS)
            }
            for recorded in recorder.launches
        }
    return found


def launch_on_meta(launch, rows, scored, numel, dtype):
    latent = lambda n: torch.empty(n, numel, dtype=dtype, device="meta")  # noqa: E731
    per_row = lambda n, dtype=torch.float32: torch.empty(n, dtype=dtype, device="meta")  # noqa: E731
    student = (latent(rows), latent(rows), per_row(rows), per_row(rows, torch.int64), per_row(rows))
    scores = (latent(scored), per_row(scored), *(latent(scored) for _ in range(3)))
    launch.loss_kernels(*student, *scores, latent(rows - scored), 4.0)


def facts(triton_compiler, compiled):
    if "amdgcn" in compiled.asm:
        fields = ("private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count")
        read = [int(re.search(rf"\.{field}: *(\d+)", compiled.asm["amdgcn"])[1]) for field in fields]
        return {"spilled": sum(read), "shared": compiled.metadata.shared}
    with tempfile.TemporaryDirectory() as folder:
        resources = triton_compiler.resources(compiled, Path(folder))
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    return {
        "spilled": resources.stack,
        "shared": resources.shared,
        "atomics": re.findall(r"\b(?:atom|red)\.", ptx),
        "nan_lost": re.findall(r"arith\.(?:max|min)numf", ttir),
        "fp64": re.findall(r"\w+\.f64", ptx),
        "wide_loads": len(re.findall(r"ld\.global[.\w:]*\.v4", ptx)),
        "scalar_moves": re.findall(r"tt\.addptr .*: !tt\.ptr<\w+>, (\w+)", ttir),
    }


def traced_graphs():
    """AOTAutograd's graphs of the op, forward and backward: the kernels' mutated arguments, the other operators."""
    import triton
    from helpers.loss_cases import CASES, make
    from helpers.triton_compiler import TARGETS
    from torch._dynamo.backends.common import aot_autograd

    from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton

    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGETS["sm_90"]))
    c, graphs = make(CASES["all_kinds"], dtype=torch.float32), []

    def keep(module, inputs):
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        graphs.append(
            {
                "kernels": [n.kwargs["tensors_to_clone"] for n in calls if "tensors_to_clone" in n.kwargs],
                "other": [str(n.target) for n in calls if str(n.target).startswith("aten")],
            }
        )
        return stop

    def stop(*args):
        raise InterruptedError("traced; there is no GPU to run on")

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    loss = lambda velocity: 2 * coarse_to_fine_loss_triton(**{**c, "velocity": velocity})[0]  # noqa: E731
    try:
        torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)(c["velocity"])
    except InterruptedError:
        return graphs


if __name__ == "__main__":
    few = sys.argv[1:] == ["few"]
    graphs = traced_graphs() if few else []
    print(json.dumps({"graphs": graphs, "code": compiled_kernels([s for s in SHAPES if (s == FEW) == few])}))
