"""Copies to a device: the host does not wait for them where that is safe."""

from __future__ import annotations

import os

import pytest
import torch

from clora.bank.slots import fill
from clora.devices import copies_later, find_device, find_dtype, has_amx, multiplies_bfloat16, send, take
from clora.errors import CloraError

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_gpu_of_a_machine_is_hidden_from_tests_that_do_not_ask_for_it():
    assert find_device("auto") == torch.device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available()


@pytest.mark.parametrize(("device", "later"), [("cuda", True), ("meta", True), ("mps", False), ("cpu", False)])
def test_the_host_waits_where_the_device_might_read_a_source_that_is_gone(device, later, monkeypatch):
    calls, pinned = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.stride()) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append(kwargs) or self)
    send(torch.zeros(1).expand(3), device)
    assert copies_later(torch.device(device)) is later
    assert calls[-1] == {"non_blocking": later}
    assert pinned == ([(1,)] if device == "cuda" else []), "an expanded tensor cannot be pinned"


def test_tensors_arrive_in_the_requested_dtype():
    values = torch.tensor([1.0, 0.1])
    assert send(values, "cpu") is values
    assert torch.equal(send(values, "cpu", torch.bfloat16), values.bfloat16())
    sent = send(values, "meta", torch.bfloat16)
    assert (sent.device.type, sent.dtype) == ("meta", torch.bfloat16)


def test_taken_rows():
    values = torch.arange(6.0).reshape(3, 2)
    assert take(values, torch.tensor([2, 0])).tolist() == [[4, 5], [0, 1]]
    assert take(values, slice(1, 3)).tolist() == [[2, 3], [4, 5]]
    assert take(values, 1).tolist() == [2, 3]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "xpu", "", "cuda:77", "cuda:128", "cuda:01", "cpu:0"])
def test_a_device_that_is_missing_is_refused(name):
    with pytest.raises(CloraError, match="device"):
        find_device(name)


def test_auto_is_the_cpu_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("amx", "on_cpu"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_matrix_units_compute_in_it(monkeypatch, amx, on_cpu):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    found = [find_dtype("auto", torch.device(device)) for device in ("cuda", "cpu", "mps")]
    assert found == [torch.bfloat16, on_cpu, torch.float32]


def test_other_processors_and_earlier_pytorch_have_no_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64"}, raising=False)
    assert find_dtype("auto", torch.device("cpu")) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert find_dtype("auto", torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("limits", "amx"),
    [
        ({}, True),
        ({"ONEDNN_MAX_CPU_ISA": "ALL"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "default"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX10_1_512_AMX_FP16"}, True),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "avx2"}, False),
        ({"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "", "DNNL_MAX_CPU_ISA": "AVX2"}, False),
        ({"ONEDNN_MAX_CPU_ISA": "ALL", "DNNL_MAX_CPU_ISA": "AVX2"}, True),
    ],
)
def test_a_user_may_keep_onednn_from_amx(monkeypatch, limits, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in limits.items():
        monkeypatch.setenv(name, value)
    assert has_amx() == multiplies_bfloat16() == amx


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("ALL", True),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_AMX", True),
        ("AVX512_CORE_VNNI", False),
        ("AVX2", False),
    ],
)
def test_avx512_multiplies_bfloat16_without_amx(monkeypatch, limit, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bfloat16() == expected
    assert not has_amx()


def test_a_named_dtype_is_taken_anywhere():
    assert find_dtype("float32", torch.device("cuda")) == torch.float32
    assert find_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 1 << 24])
def test_the_host_waits_for_no_copy_and_may_change_the_source_at_once(count, dtype):
    send(torch.ones(count), "cuda", dtype)  # pinned memory is allocated, which may wait
    torch.cuda.synchronize()
    values, done = torch.ones(count), torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second of the GPU
    sent = send(values, "cuda", dtype)
    done.record()
    assert not done.query()
    values.zero_()
    assert sent.min() == 1


@gpu
@needs_gpu
def test_a_slot_may_be_filled_from_ordinary_memory_that_is_changed_at_once():
    slot = {"layer": (torch.zeros(4, 8, device="cuda"), torch.zeros(8, 4, device="cuda"))}
    a, b = torch.ones(2, 8), torch.ones(8, 2)
    torch.cuda._sleep(1_000_000_000)
    fill(slot, {"layer": (a, b)})
    a.zero_()
    b.zero_()
    assert slot["layer"][0].sum() == slot["layer"][1].sum() == 16
