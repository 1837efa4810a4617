"""Measuring on the CPU: contents of a record, faults of providers, resuming, the budget."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import bench.measure
import bench.worker
from bench import records
from bench.cases import DesignCase, LinearCase, LossCase, cpu_cases
from bench.measure import Bench, DeviceLost
from bench.providers import Unavailable
from bench.timing import countdown
from bench.worker import FIRST_ESTIMATE_S, chosen_designs, measure_all, measure_one
from clora import ops
from csrc_triton.multi_lora import designs


def stopwatch(call):
    """One on which every call takes a second."""
    call()
    return 1000.0, 0.5


BENCH = Bench(torch.device("cpu"), stopwatch, {"tflop_per_s": 1.0, "gb_per_s": 10.0}, rounds=2, warmup=1)
MACHINE = {"gpu": "none", "capability": [9, 0], "triton": "3.7.1", "revision": "r1"}
A_DAY = countdown(86400)


def case(rank=2):
    return LinearCase(
        mode="forward", in_features=4, out_features=6, samples=2, tokens=3, adapters=2, rank=rank, dtype="float32"
    )


def providing(monkeypatch, make_inputs=lambda case, device: None, **builders):
    """Replaces the computation of a case: the truth is one, and the providers are these."""
    truth = {"y": torch.ones(2, dtype=torch.float64)}
    family = SimpleNamespace(
        make_inputs=make_inputs, expected=lambda i: truth, eager=lambda i: truth, providers=lambda case: builders
    )
    monkeypatch.setattr(bench.measure, "family_of", lambda case: family)


def right(inputs):
    return lambda: {"y": torch.ones(2)}


def wrong(inputs):
    return lambda: {"y": torch.tensor([1.0, 1.01])}


def raising(error):
    def build(*arguments):
        raise error

    return build


def read(folder, rank=2):
    return records.read(records.path_of(folder, case(rank)))


@pytest.fixture(autouse=True)
def no_release(monkeypatch):
    """Spares the garbage collection between cases, which takes longer than they do."""
    monkeypatch.setattr(bench.worker, "release", lambda: None)


@pytest.mark.parametrize("case", cpu_cases(), ids=lambda case: case.name.partition("-b")[0])
def test_a_case_measured_to_its_end(case, tmp_path, capsys):
    record = measure_one(case, tmp_path, BENCH, MACHINE, "r1")
    assert json.loads(records.path_of(tmp_path, case).read_text()) == json.loads(json.dumps(record))
    assert (record["status"], record["revision"], record["machine"], record["current"]) == ("done", "r1", MACHINE, None)
    assert record["work"]["flops"] > 0
    if isinstance(case, DesignCase):
        assert "median_ms" in record["providers"]["base"]  # a CPU has no kernels to force
        return
    ours = record["providers"]["ours"]
    assert (ours["median_ms"], ours["host_ms"], ours["rounds"]) == (1000.0, 0.5, 2)
    assert ours["roof_percent"] > 0
    assert all(ours["errors"][name] <= bound for name, bound in record["allowed_errors"].items())
    assert not any("failed" in entry or "wrong" in entry for entry in record["providers"].values())
    assert case.name in capsys.readouterr().out


def test_faults_are_recorded_and_never_timed(tmp_path, monkeypatch):
    builders = {
        "wrong": wrong,
        "broken": raising(ValueError("no such\nshape")),
        "absent": raising(Unavailable("no such op")),
        "base": wrong,  # the base layer computes something else and is not compared
        "right": right,
    }
    providing(monkeypatch, **builders)
    found = measure_one(case(), tmp_path, BENCH, MACHINE, "r1")["providers"]
    assert found["wrong"]["wrong"].startswith("y: error 7.07e-03")
    assert found["broken"] == {"failed": "ValueError: no such shape"}
    assert found["absent"] == {"unavailable": "no such op"}
    assert {name for name, entry in found.items() if "median_ms" in entry} == {"base", "right"}


def test_a_case_that_cannot_be_set_up_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch):
    def make_inputs(case, device):
        if case.rank == 2:
            raise torch.OutOfMemoryError("tried to allocate")

    providing(monkeypatch, make_inputs, ours=right)
    assert measure_all([case(2), case(3)], tmp_path, BENCH, MACHINE, "r1", A_DAY) == 0
    assert (read(tmp_path, 2)["status"], read(tmp_path, 2)["error"]) == (
        "failed",
        "OutOfMemoryError: tried to allocate",
    )
    assert read(tmp_path, 3)["status"] == "done"


def test_finished_cases_are_passed_over_only_at_the_same_revision(tmp_path, monkeypatch):
    built = []
    providing(monkeypatch, ours=lambda inputs: built.append(1) or right(inputs))
    for current, expected in (("r1", 2), ("r1", 2), ("r2", 4)):
        assert measure_all([case(2), case(3)], tmp_path, BENCH, MACHINE, current, A_DAY) == 0
        assert len(built) == expected
    records.path_of(tmp_path, case(2)).write_text("{ torn")
    assert measure_all([case(2), case(3)], tmp_path, BENCH, MACHINE, "r2", A_DAY) == 0
    assert len(built) == 5


def test_a_case_is_measured_anew_where_the_table_of_designs_chooses_otherwise(tmp_path, monkeypatch):
    built = []
    providing(monkeypatch, ours=lambda inputs: built.append(1) or right(inputs))
    student = replace(case(2), mode="student", adapters=1)
    cases = [case(2), case(40), student, LossCase(samples=1, latent=(1, 2, 2))]
    entry = {"device": "sm_90", "triton": "3.7", "dtype": "float32", "in_features": 4, "out_features": 6}
    # Without a measurement the model takes fused for so small a layer.
    split = {**entry, "rank": 2, "min_tokens": 1, "design": "split"}
    back = {**split, "in_features": 6, "out_features": 4}  # the student's gradient of x
    for table, again in (([], 4), ([split], 2), ([split], 0), ([split, back], 1), ([{**split, "triton": "3.6"}], 2)):
        designs._exact_designs.cache_clear()
        monkeypatch.setattr(designs, "_table", lambda table=table: {"measured": table})
        built.clear()
        assert measure_all(cases, tmp_path, BENCH, MACHINE, "r1", A_DAY) == 0
        assert len(built) == again
    designs._exact_designs.cache_clear()
    assert [records.read(records.path_of(tmp_path, each))["designs"] for each in cases] == [
        ["fused"],
        ["fused"],
        ["fused", "fused"],
        [],
    ]


def test_the_choice_of_a_frozen_adapter_with_many_rows_is_merged(monkeypatch):
    entry = {"device": "sm_90", "triton": "3.7", "dtype": "float32", "in_features": 4, "out_features": 6, "rank": 2}
    monkeypatch.setattr(designs, "_table", lambda: {"measured": [{**entry, "min_rows": 6, "design": "merged"}]})
    designs.rows_to_merge.cache_clear()
    exact = ["fused"], ["fused", "fused"]
    few = case(2)  # 3 rows of each of two adapters
    many = replace(few, samples=4)
    student = replace(many, mode="student", adapters=1)
    assert [chosen_designs(each, MACHINE) for each in (few, many, student)] == [exact[0], ["merged"], exact[1]]
    designs.rows_to_merge.cache_clear()


def test_no_case_is_begun_that_would_not_end_in_time(tmp_path, monkeypatch):
    now = [0.0]
    durations = iter([40.0, 5.0, 5.0, 5.0, 5.0, 20.0])

    def ours(inputs):
        now[0] += next(durations)
        return right(inputs)

    providing(monkeypatch, ours=ours)
    left = countdown(95.0, lambda: now[0])
    # 55, 50, 45, 40, 35 s are left, then 15: not enough for another 20.
    assert measure_all([case(rank) for rank in range(2, 10)], tmp_path, BENCH, MACHINE, "r1", left) == 2
    assert left() == pytest.approx(15.0)
    assert measure_all([case(9)], tmp_path, BENCH, MACHINE, "r1", countdown(FIRST_ESTIMATE_S)) == 1


def test_after_a_lost_device_the_case_goes_on_without_the_culprit(tmp_path, monkeypatch):
    providing(monkeypatch, culprit=raising(RuntimeError("illegal address")), ours=right)
    with monkeypatch.context() as patch:
        patch.setattr(bench.measure, "check_alive", raising(DeviceLost("after culprit")))
        with pytest.raises(DeviceLost):
            measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    assert "culprit" in read(tmp_path)["providers"]
    record = measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    assert record["status"] == "done"
    assert record["providers"]["culprit"] == {"failed": "RuntimeError: illegal address"}
    assert "median_ms" in record["providers"]["ours"]


@pytest.mark.parametrize(("times", "left_out"), [(1, False), (2, True)])
def test_a_provider_at_which_processes_ended_twice_is_left_out(times, left_out, tmp_path, monkeypatch):
    providing(monkeypatch, slow=right, ours=right)
    with monkeypatch.context() as patch:
        patch.setattr(bench.measure, "_admit", raising(KeyboardInterrupt()))
        for _ in range(times):
            with pytest.raises(KeyboardInterrupt):
                measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    providers = measure_one(case(), tmp_path, BENCH, MACHINE, "r1")["providers"]
    assert ("median_ms" in providers["slow"]) != left_out
    assert (providers["slow"] == {"failed": "the process ended here 2 times"}) == left_out
    assert "median_ms" in providers["ours"]


def test_where_processes_ended_twice_outside_any_provider_the_case_has_failed(tmp_path, monkeypatch):
    providing(monkeypatch, raising(KeyboardInterrupt()), ours=right)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    assert measure_one(case(), tmp_path, BENCH, MACHINE, "r1")["error"] == "inputs: the process ended here 2 times"
    assert records.is_finished(read(tmp_path), "r1", ["fused"])


@pytest.mark.parametrize("content", ["[1]", "7", "no JSON"])
def test_what_is_no_record_is_measured_anew(content, tmp_path):
    records.path_of(tmp_path, case()).write_text(content)
    assert read(tmp_path) is None
    assert records.read_all(tmp_path) == []


def test_main_measures_on_a_device_and_refuses_to_fall_back(tmp_path, monkeypatch, capsys):
    """On a CPU in place of the GPU: there ours must fail with a reason instead of running as eager PyTorch."""
    monkeypatch.setenv("CLORA_BACKEND", "auto")
    monkeypatch.setattr("clora.ops.interpreting", lambda: False)  # another test may have it on
    monkeypatch.setattr("clora.ops._obstacle", ops._obstacle.__wrapped__)  # and its answer is kept
    monkeypatch.setattr(bench.worker, "GPU", torch.device("cpu"))
    monkeypatch.setattr(bench.worker, "CudaStopwatch", lambda device: stopwatch)
    monkeypatch.setattr(bench.worker, "describe", lambda device: MACHINE)
    monkeypatch.setattr(bench.worker, "measure_roof", lambda device, stopwatch: BENCH.roof)
    monkeypatch.setitem(bench.worker.CASES, "every", lambda: [case(3)])
    assert bench.worker.main([str(tmp_path), "--budget-s", "1", "--cases", "every"]) == bench.worker.UNFINISHED
    assert "0 of 1 cases finished" in capsys.readouterr().out
    assert bench.worker.main([str(tmp_path), "--budget-s", "100", "--cases", "every"]) == 0
    providers = read(tmp_path, 3)["providers"]
    assert "median_ms" in providers["baddbmm"]
    assert providers["ours"]["failed"].startswith("CloraError: CLORA_BACKEND=triton, but multi_lora_linear cannot run")
    assert "1 of 1 cases finished" in capsys.readouterr().out


def test_main_reports_a_lost_device_to_its_supervisor(tmp_path, monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "auto")
    for name, value in {
        "GPU": torch.device("cpu"),
        "CudaStopwatch": lambda device: None,
        "describe": lambda device: {"revision": "r1"},
        "measure_roof": lambda device, stopwatch: {},
        "measure_all": raising(DeviceLost("after ours")),
    }.items():
        monkeypatch.setattr(bench.worker, name, value)
    assert bench.worker.main([str(tmp_path), "--budget-s", "1", "--cases", "telling"]) == bench.worker.DEVICE_LOST
