"""The choice of an op's implementation: what is logged when it falls back, and what is refused."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from clora import ops
from clora.errors import CloraError
from clora.ops import covered, use_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def unset(monkeypatch, caplog):
    """The variable is unset, nothing has been logged yet, all levels are shown."""
    monkeypatch.delenv("CLORA_BACKEND", raising=False)
    ops._report.cache_clear()
    ops._obstacle.cache_clear()
    caplog.set_level(logging.INFO, "clora.ops")


@pytest.fixture
def machine(monkeypatch):
    """Returns pretend(...): a machine whose GPU, Triton and interpreter are as stated."""

    def pretend(import_error="", interpreting=False, capability=(9, 0), hip=None):
        monkeypatch.setattr(ops, "_import_error", lambda: import_error)
        monkeypatch.setattr(ops, "interpreting", lambda: interpreting)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        ops._obstacle.cache_clear()

    yield pretend
    ops._obstacle.cache_clear()


def linear_inputs(num_adapters=2):
    x, weight, bias = torch.randn(3, 4, 6), torch.randn(5, 6), torch.randn(5)
    factors = torch.randn(num_adapters, 2, 6), torch.randn(num_adapters, 5, 2)
    return [x, weight, bias, *factors, torch.ones(num_adapters), torch.tensor([0, -1, 1])]


def anchor_inputs():
    velocity, sigma = torch.randn(2, 3), torch.rand(2)
    return velocity, velocity, sigma, torch.tensor([2, 2]), torch.ones(2), None, torch.randn(2, 3), 1.0


def test_auto_on_a_cpu_is_eager_and_logs_it_once(caplog):
    for _ in range(2):
        ops.multi_lora_linear(*linear_inputs())
        ops.coarse_to_fine_loss(*anchor_inputs())
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "running on eager PyTorch instead of the Triton kernels: the tensors are on cpu, and the kernels need a GPU"
    )


def test_auto_takes_triton_on_a_gpu(machine, caplog):
    machine()
    assert use_triton("op", GPU)
    assert covered("op", None, GPU)
    assert not caplog.records


@pytest.mark.parametrize(
    ("pretended", "reason"),
    [
        ({"import_error": "ImportError: no libtriton"}, "Triton cannot be imported (ImportError: no libtriton)"),
        ({"capability": (7, 5)}, "cuda:0 has compute capability 7.5, and Triton needs 8.0"),
        ({"interpreting": True}, "TRITON_INTERPRET is set, a mode for tests"),
        (
            {"hip": "6.4", "import_error": "not looked at"},
            "cuda:0 is an AMD GPU, on which they have never run (CLORA_BACKEND=triton runs them there)",
        ),
    ],
    ids=["no_triton", "old_gpu", "interpreter", "amd"],
)
def test_auto_on_a_gpu_that_cannot_run_the_kernels_warns_once(machine, caplog, pretended, reason):
    machine(**pretended)
    assert not use_triton("op", GPU)
    assert not use_triton("other", GPU)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"running on eager PyTorch instead of the Triton kernels: {reason}"


def test_an_explicit_triton_runs_on_an_amd_gpu_which_has_no_cuda_capability(machine, monkeypatch, caplog):
    machine(capability=(7, 5), hip="6.4")
    assert use_triton("op", GPU, "triton")
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    assert use_triton("op", GPU)
    assert not caplog.records


@pytest.mark.parametrize("by", ["variable", "argument"])
@pytest.mark.parametrize(
    ("device", "pretended", "message"),
    [
        (CPU, {}, "the tensors are on cpu, and the kernels need a GPU; move them to one, or"),
        (CPU, {"import_error": "No module"}, r"Triton cannot be imported \(No module\); install it with `pip install"),
        (GPU, {"import_error": "No module"}, r"Triton cannot be imported \(No module\); install it with `pip install"),
        (GPU, {"capability": (7, 0)}, "cuda:0 has compute capability 7.0, and Triton needs 8.0; "),
    ],
)
def test_an_explicit_triton_that_cannot_run_raises(machine, monkeypatch, by, device, pretended, message):
    machine(**pretended)
    monkeypatch.setenv("CLORA_BACKEND", "triton" if by == "variable" else "eager")
    asked, argument = ("CLORA_BACKEND=triton", None) if by == "variable" else ("backend='triton'", "triton")
    with pytest.raises(CloraError, match=f"^{asked}, but some_op cannot run on Triton: {message}") as error:
        use_triton("some_op", device, argument)
    assert str(error.value).endswith("unset CLORA_BACKEND" if by == "variable" else "use backend 'auto'")


def test_the_interpreter_runs_when_triton_is_asked_for_and_never_by_itself(machine, caplog):
    machine(interpreting=True)
    assert use_triton("op", CPU, "triton")
    assert not use_triton("op", CPU)
    assert not use_triton("op", GPU)


def test_a_gap_in_the_kernels_falls_back_or_raises(machine, caplog):
    machine()
    assert not covered("some_op", "x is fp64", GPU)
    assert [r.getMessage() for r in caplog.records] == [
        "running on eager PyTorch instead of the Triton kernels: the kernels of some_op do not cover this call (x is fp64)"
    ]
    with pytest.raises(
        CloraError, match=r"backend='triton', but some_op cannot run.*\(x is fp64\); use backend 'auto'"
    ):
        covered("some_op", "x is fp64", GPU, "triton")


def test_eager_runs_eagerly_and_logs_nothing(machine, monkeypatch, caplog):
    machine()
    monkeypatch.setenv("CLORA_BACKEND", "eager")
    assert not use_triton("op", GPU)
    assert use_triton("op", GPU, "triton"), "the argument overrides the variable"
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    assert not use_triton("op", GPU, "eager")
    assert not caplog.records


def test_an_empty_variable_is_auto(monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "")
    assert not use_triton("op", CPU)


@pytest.mark.parametrize("argument", [None, "cpu"])
def test_an_unknown_backend_is_named_with_a_suggestion(monkeypatch, argument):
    monkeypatch.setenv("CLORA_BACKEND", "Trition")
    expected = {
        None: "CLORA_BACKEND=Trition: expected one of auto, triton, eager; did you mean 'triton'?",
        "cpu": "backend='cpu': expected one of auto, triton, eager",
    }
    with pytest.raises(CloraError) as error:
        ops.multi_lora_linear(*linear_inputs(), backend=argument)
    assert str(error.value) == expected[argument]


@pytest.mark.parametrize("gap", [None, "reason"])
@pytest.mark.parametrize(
    ("folder", "op", "inputs"),
    [("multi_lora", "multi_lora_linear", linear_inputs), ("coarse_to_fine", "coarse_to_fine_loss", anchor_inputs)],
)
def test_each_op_goes_to_its_kernels_or_to_its_reference(monkeypatch, folder, op, inputs, gap):
    given, module = inputs(), ModuleType("op")
    module.recorded = lambda *args, **options: None
    module.unsupported = lambda *args: gap
    module.multi_lora_linears = lambda x, layers, scale, ids, *args, **options: [(x, *layers[0], scale, ids)]
    module.coarse_to_fine_loss_triton = lambda *args: args
    monkeypatch.setitem(sys.modules, f"csrc_triton.{folder}.op", module)
    monkeypatch.setattr(f"csrc_triton.{folder}.op", module, raising=False)
    monkeypatch.setattr(ops, "use_triton", lambda name, device, backend: name == op)
    out = getattr(ops, op)(*given)
    if gap is None:
        assert all(a is b for a, b in zip(out, given, strict=True))
    else:
        reference = getattr(ops, op)(*given, backend="eager")
        torch.testing.assert_close(out, reference, rtol=0, atol=0)


def test_without_triton_everything_runs_eagerly():
    """In a process where Triton cannot be imported, as on macOS and Windows."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from torch import ones
from clora.errors import CloraError
from clora.ops import coarse_to_fine_loss, multi_lora_linear

assert "torch._dynamo" not in sys.modules, "it takes seconds to import"
loss, _ = coarse_to_fine_loss(ones(1, 2), ones(1, 2), *[ones(1)] * 3, None, torch.zeros(1, 2), 1.0)
inputs = ones(1, 1, 2), ones(3, 2), None, ones(1, 1, 2), ones(1, 3, 1), ones(1), torch.tensor([0])
print(float(multi_lora_linear(*inputs).sum()))
assert not any(name.startswith("csrc_triton") and name.endswith("kernels") for name in sys.modules)
try:
    multi_lora_linear(*inputs, backend="triton")
except CloraError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    total, message = out.splitlines()
    assert total == "12.0"
    assert message.startswith(
        "backend='triton', but multi_lora_linear cannot run on Triton: Triton cannot be imported ("
    )
