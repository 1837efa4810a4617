"""The multi-adapter layer's kernels compiled for GPUs that are not there, and as torch.compile sees them.

Both need kernels that are not interpreted, in a process of their own: this file run as a script, with "few" or "rest" as its
argument. It prints every fact as JSON; with "table" it prints the resources that `csrc_triton/README.md` lists.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NVIDIA = ("sm_80", "sm_90", "sm_100")
ALL = (*NVIDIA, "gfx942")
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
SAMPLES, TOKENS, ADAPTERS = 16, 8192, 8


class Shape(NamedTuple):
    """A layer; its factors are of the dtype of x, their gradients fp32."""

    inputs: int
    outputs: int
    rank: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "square": Shape(3072, 3072, 128),
    "up": Shape(3072, 12288, 16),
    "down": Shape(12288, 3072, 64),
    "large": Shape(18432, 18432, 256),  # x and y are of more than 2^31 elements
    "fp32": Shape(3072, 3072, 64, torch.float32),
    "odd": Shape(3075, 3071, 20),
}
EVERY_KERNEL = ("shrink", "shrink_qkv", "expand", "expand_add", "linear", "grad_x", "grad_B", "grad_A_qkv", "reduce")
COMPILED = [  # (shape, launches, targets)
    ("square", EVERY_KERNEL, ("sm_90",)),
    ("square", ("shrink", "expand", "linear", "grad_x", "grad_B", "reduce"), ("sm_80", "sm_100", "gfx942")),
    ("square", ("shrink_qkv", "grad_A_qkv"), ("sm_80",)),
    ("up", ("shrink", "linear", "grad_B"), ("sm_90",)),
    ("down", ("shrink", "linear", "grad_B"), ("sm_80", "sm_90")),
    ("large", ("shrink", "expand", "expand_add", "linear", "grad_B"), ("sm_80", "sm_90")),
    ("fp32", ("shrink", "expand", "linear", "grad_B", "grad_A_qkv"), ("sm_90", "gfx942")),
    ("odd", ("shrink", "linear", "grad_B"), ("sm_80",)),
]
COMBINATIONS = [(shape, *each) for shape, launches, targets in COMPILED for each in product(launches, targets)]
FEW = [("square", name, "sm_90") for name in EVERY_KERNEL]
"""Every launch once, on the GPU that differs most from others; the rest are slow tests."""
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}


@pytest.fixture(scope="module")
def found(triton_cache):
    """Returns found("few") or found("rest"): the printed result of this file run as a script."""
    pytest.importorskip("triton")

    @cache
    def run(which):
        folder = {"TRITON_CACHE_DIR": str(triton_cache)}
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, __file__, which]
        out = subprocess.run(command, env=inherited | folder, capture_output=True, text=True, timeout=900)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout.splitlines()[-1])

    return run


@pytest.fixture
def code_of(found):
    def of(*combination):
        code, name = found("few" if combination in FEW else "rest")["code"], "/".join(combination)
        return code[name] if name in code else pytest.skip(f"this Triton lacks the linker of {combination[2]}")

    return of


def those(**wanted):
    """Parametrises over the combinations of the wanted shapes, launches and targets."""
    position = {"shape": 0, "name": 1, "target": 2}
    chosen = [c for c in COMBINATIONS if all(c[position[key]] in values for key, values in wanted.items())]
    assert chosen
    marked = [pytest.param(c, id="/".join(c), marks=[] if c in FEW else pytest.mark.slow) for c in chosen]
    return pytest.mark.parametrize("combination", marked)


@those()
def test_nothing_spills_and_it_fits(code_of, combination):
    code = code_of(*combination)
    assert code["spilled"] == 0, code
    assert code["shared"] <= SHARED_MEMORY[combination[2]], code
    assert not code["atomics"], "the order of atomic additions is not fixed"
    assert not code["fp64"]


@those(shape=("square", "up", "down", "large"))
def test_bf16_products_run_on_tensor_cores(code_of, combination):
    """On Hopper every product is wgmma: each tile has the 64 rows per four warps that it needs."""
    code, target = code_of(*combination), combination[2]
    if combination[1] != "reduce":
        others = {name: count for name, count in code["products"].items() if name != TENSOR_CORES[target]}
        assert code["products"][TENSOR_CORES[target]] > 0
        assert not any(others.values()), others


@those(shape=("fp32",), target=("sm_90",))
def test_fp32_is_not_rounded_to_tf32(code_of, combination):
    assert not any(code_of(*combination)["products"].values())


@those(shape=("square", "up", "down", "large"), name=("linear", "grad_x"))
def test_the_base_product_reads_and_writes_by_tma_on_hopper_and_later(code_of, combination):
    """Both halves of y too, and nothing of x, the weight, the ranks or y by pointers."""
    code = code_of(*combination)
    if combination[2] in ("sm_90", "sm_100"):
        assert code["tma_loads"] > 0
        assert code["tma_stores"] == 2
        assert not code["copies"]
        assert not code["stores"]
    else:
        assert code["tma_loads"] == code["tma_stores"] == 0


@those(shape=("square", "up", "down", "large"), name=("linear", "grad_x"), target=("sm_90",))
def test_a_product_is_in_flight_while_the_next_operands_are_awaited(code_of, combination):
    """Of the channels and of the ranks; and in each loop the last one is awaited once, behind it."""
    assert sorted(code_of(*combination)["in_flight"]) == [0, 0, 1, 1]


@those(name=("expand", "expand_add"), target=("sm_90",), shape=("square",))
def test_the_expansion_waits_few_times(code_of, combination):
    """For its operands, and for the layout in which y is stored; two more where a base changes its layout, too."""
    assert code_of(*combination)["barriers"] <= (3 if combination[1] == "expand" else 6)


@those(name=("shrink", "shrink_qkv"), target=("sm_90",), shape=("square", "large"))
def test_aligned_rows_are_copied_16_bytes_at_a_time(code_of, combination):
    """Also where the ranks of several factors are selected, which hides their alignment from Triton 3.9."""
    assert not code_of(*combination)["narrow_copies"]


@those(name=("linear", "grad_x"), target=("sm_90",), shape=("square", "large"))
def test_the_rank_takes_no_shared_memory_of_the_base_product(code_of, combination):
    """Four stages of 128 x 64 and 256 x 64 bf16, half a tile of y, tensor maps and barriers: at every rank the same."""
    assert code_of(*combination)["shared"] <= (4 * (128 + 256) * 64 + 128 * 128) * 2 + 1024


@those(name=("shrink", "grad_B"), target=("sm_90",), shape=("up",))
def test_four_programs_of_a_small_rank_share_the_registers(code_of, combination):
    """Kernels bound by bandwidth: one program computes while another waits for memory."""
    assert 4 * 128 * code_of(*combination)["registers"] <= 65_536


@those(target=("sm_90",), shape=("square", "large"))
def test_first_elements_are_addressed_in_64_bits(code_of, combination):
    """The first move of every pointer is an i64, but of those that stay within one bias, one list of ids, one row of ranks."""
    moves = code_of(*combination)["first_moves"]
    assert moves
    short = {("expand", "p_bias"), ("linear", "p_bias"), ("linear", "p_ids"), ("grad_x", "p_ids"), ("reduce", "p_ids")}
    short |= {("linear", "p_low"), ("grad_x", "p_low")}  # to the layer's first rank; tensor maps address the rest
    for pointer, offset in moves.items():
        assert offset == "i64" or (combination[1], pointer) in short, moves


@pytest.mark.slow
def test_shapes_share_the_compiled_fused_kernel(code_of):
    """Only the dtype, the tiles and the layouts are compiled in."""
    assert len({code_of(shape, "linear", "sm_90")["hash"] for shape in ("square", "down", "large")}) == 1


def test_torch_compile_sees_the_kernels_and_what_they_write(found):
    forward, backward = found("few")["graphs"]
    assert forward["kernels"] == [["p_low"], ["p_y"]]
    assert backward["kernels"] == [["p_low", "p_partial"], ["p_out"], ["p_y"], ["p_partial"], ["p_out"]]
    for graph in (forward, backward):
        assert not graph["copies"], "an input or a weight that seems to be written would be copied"


def compiled_kernels(combinations):
    """{"shape/launch/target": facts} of combinations."""
    from helpers import triton_compiler

    from csrc_triton.multi_lora import kernels, launch
    from csrc_triton.multi_lora.tiles import Machine

    found = {}
    for shape, name, target in combinations:
        if not triton_compiler.has_tools(target):
            continue
        machine = Machine(SHARED_MEMORY[target], target in ("sm_90", "sm_100"), multiprocessors=132)
        launch.machine_of = lambda device, machine=machine: machine
        launch.wrap_triton = recorder = triton_compiler.Recorder()
        launches_of(launch, SHAPES[shape])[name]()
        (recorded,) = recorder.launches
        compiled = triton_compiler.compile_launch(kernels, recorded, target)
        found[f"{shape}/{name}/{target}"] = facts(triton_compiler, compiled)
    return found


def launches_of(launch, shape: Shape):
    """Every launch of the op for a layer, on meta tensors, by name."""
    k, n, r, dtype = shape
    empty = lambda *sizes, dtype=dtype: torch.empty(sizes, dtype=dtype, device="meta")  # noqa: E731
    rows = lambda width: empty(SAMPLES, TOKENS, width)  # noqa: E731
    x, dy, low, low_qkv, weight, bias = rows(k), rows(n), rows(r), rows(3 * r), empty(n, k), empty(n)
    a, b = empty(ADAPTERS, r, k), empty(ADAPTERS, n, r)
    scale, ids = empty(ADAPTERS, dtype=torch.float32), empty(SAMPLES, dtype=torch.int64)
    partial = empty(SAMPLES, 8, k, 3 * r, dtype=torch.float32)
    return {
        "shrink": lambda: launch.shrink(x, [a], scale, ids, low),
        "shrink_qkv": lambda: launch.shrink(x, [a, a, a], scale, ids, low_qkv),
        "expand": lambda: launch.expand(low, 0, b, ids, bias=bias),
        "expand_add": lambda: launch.expand(low, 0, b, ids, base=dy),
        "linear": lambda: launch.linear(x, weight, bias, low, 0, b, ids),
        "grad_x": lambda: launch.linear(dy, weight.mT, None, low_qkv, r, a.mT, ids, y=rows(k)),
        "grad_B": lambda: launch.gradients(dy, low, r, ids, 0, (b.mT, scale, low, 0)),
        "grad_A_qkv": lambda: launch.gradients(x, low_qkv, 3 * r, ids),
        "reduce": lambda: launch.reduce(partial, r, a.float(), ids, transposed=True),
    }


def facts(triton_compiler, compiled):
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        read = lambda field: int(re.search(rf"\.{field}: *(\d+)", code)[1])  # noqa: E731
        spilled = sum(map(read, ("private_segment_fixed_size", "sgpr_spill_count", "vgpr_spill_count")))
        registers, shared = read("vgpr_count"), compiled.metadata.shared
    else:
        code = compiled.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            registers, spilled, shared = vars(triton_compiler.resources(compiled, Path(folder))).values()
    return {
        "hash": compiled.hash,
        "spilled": spilled,
        "shared": shared,
        "registers": registers,
        "atomics": re.findall(r"\b(?:atom|red)\.|global_atomic", code),
        "fp64": re.findall(r"\w+\.f64|v_\w+_f64", code),
        "products": {name: len(re.findall(rf"\b{re.escape(name)}", code)) for name in (*TENSOR_CORES.values(),)},
        "tma_loads": len(re.findall(r"cp\.async\.bulk\.tensor\.\w+\.shared", code)),
        "tma_stores": len(re.findall(r"cp\.async\.bulk\.tensor\.\w+\.global", code)),
        "in_flight": [int(count) for count in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", code)],
        "barriers": len(re.findall(r"\bbar(?:rier)?\.(?:cta\.)?sync", code)),
        "copies": len(re.findall(r"cp\.async\.c[ag]\.", code)),
        "stores": len(re.findall(r"\bst\.global", code)),
        "narrow_copies": len(re.findall(r"cp\.async\.ca\.shared\.global .*, 0x4", code)),
        "first_moves": first_moves(compiled),
    }


def first_moves(compiled):
    """{pointer argument: type of its offset}. Arguments are told by position: Triton 3.4 does not keep their names."""
    ttir, signature = compiled.asm["ttir"], compiled.src.signature
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    arguments = re.findall(r"%(\w+): ", re.search(r"tt\.func public .*", ttir)[0])
    name_of = dict(zip(arguments, names, strict=True))
    moves = re.findall(r"tt\.addptr %(\w+), .*: !tt\.ptr<\w+>, (\w+)", ttir)
    return {name_of[pointer]: offset for pointer, offset in moves if pointer in name_of}


def traced_graphs():
    """AOTAutograd's graphs of the op with a trained adapter: the kernels' mutated arguments, copies of tensors."""
    import triton
    from helpers.triton_compiler import TARGETS
    from torch._dynamo.backends.common import aot_autograd

    from csrc_triton.multi_lora import launch, op
    from csrc_triton.multi_lora.tiles import Machine

    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: TARGETS["sm_90"]))
    launch.machine_of = lambda device: Machine(SHARED_MEMORY["sm_90"], True, 132)
    op.unsupported = lambda *arguments: None  # the tensors are on the CPU
    graphs = []

    def keep(module, inputs):
        calls = [node for node in module.graph.nodes if node.op == "call_function"]
        graphs.append(
            {
                "kernels": [sorted(set(n.kwargs["tensors_to_clone"])) for n in calls if "tensors_to_clone" in n.kwargs],
                "copies": [str(n.target) for n in calls if "copy" in str(n.target) or "clone" in str(n.target)],
            }
        )
        return stop

    def stop(*args):
        raise InterruptedError("traced; there is no GPU to run on")

    x, a, b = (torch.ones(*sizes, requires_grad=True) for sizes in ((2, 5, 16), (1, 4, 16), (1, 32, 4)))
    rest = (torch.ones(1), torch.tensor([0, -1]), "fused")
    layer = lambda *t: op.multi_lora_linear_triton(t[0], t[1], None, *t[2:], *rest).square().sum()  # noqa: E731
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    try:
        torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)(x, torch.ones(32, 16), a, b)
    except InterruptedError:
        return graphs


def print_table(code):
    for combination, facts in code.items():
        print(f"{combination:32} {facts['registers']:4} registers {facts['shared'] / 1024:6.1f} KiB", facts["products"])


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    (argument,) = sys.argv[1:]
    if argument == "table":
        print_table(compiled_kernels(COMBINATIONS))
    else:
        graphs = traced_graphs() if argument == "few" else []
        combinations = [c for c in COMBINATIONS if (c in FEW) == (argument == "few")]
        print(json.dumps({"graphs": graphs, "code": compiled_kernels(combinations)}))
