"""Measuring on the CPU: what a record holds, faults of providers, resuming, the budget."""

from __future__ import annotations

import json

import pytest
import torch

import bench.measure
import bench.worker
from bench import records
from bench.cases import LinearCase, cpu_cases
from bench.families import Family
from bench.measure import Bench, DeviceLost, Progress, measure
from bench.providers import Unavailable
from bench.timing import HostStopwatch
from bench.worker import FIRST_ESTIMATE_S, Budget, measure_all, measure_one

BENCH = Bench(torch.device("cpu"), HostStopwatch(), {"tflop_per_s": 1.0, "gb_per_s": 10.0}, rounds=2, warmup=1)
MACHINE = {"gpu": "none"}


def case(rank=2):
    return LinearCase(
        mode="forward", in_features=4, out_features=6, samples=2, tokens=3, adapters=2, rank=rank, dtype="float32"
    )


def providing(monkeypatch, **builders):
    """Replaces what a case computes: the truth is one, and the providers are these."""
    truth = {"y": torch.ones(2, dtype=torch.float64)}
    family = Family(lambda case, device: None, lambda i: truth, lambda i: {"y": torch.ones(2)}, lambda case: builders)
    monkeypatch.setattr(bench.measure, "family_of", lambda case: family)


def right(inputs):
    return lambda: {"y": torch.ones(2)}


def wrong(inputs):
    return lambda: {"y": torch.tensor([1.0, 1.01])}


def raising(error):
    def build(*arguments):
        raise error

    return build


@pytest.fixture
def no_release(monkeypatch):
    """Spares the garbage collection between cases, which takes longer than they do."""
    monkeypatch.setattr(bench.worker, "release", lambda: None)


def stop(folder, current, at):
    """What a run leaves that was stopped while `at` was running."""
    record = records.begin(case(), current, records.read(records.path_of(folder, case())))
    if record["status"] == "running":
        record["current"] = at
    records.write(records.path_of(folder, case()), record)


@pytest.mark.parametrize("case", cpu_cases(), ids=lambda case: case.name.partition("-b")[0])
def test_a_case_measured_to_its_end(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench.measure, "family_of", without_compilers(bench.measure.family_of))
    record = measure_one(case, tmp_path, BENCH, MACHINE, "r1")
    assert json.loads(records.path_of(tmp_path, case).read_text()) == json.loads(json.dumps(record))
    assert (record["status"], record["revision"], record["machine"], record["current"]) == ("done", "r1", MACHINE, None)
    assert record["work"]["flops"] > 0
    ours = record["providers"]["ours"]
    assert 0 < ours["p10_ms"] <= ours["median_ms"] <= ours["p90_ms"]
    assert ours["rounds"] == 2
    assert ours["roof_percent"] > 0
    assert all(ours["errors"][name] <= bound for name, bound in record["allowed_errors"].items())
    assert not any("failed" in entry or "wrong" in entry for entry in record["providers"].values())
    assert case.name in capsys.readouterr().out


def without_compilers(family_of):
    """The families without the providers that take seconds to compile."""

    def family(case):
        of = family_of(case)
        kept = lambda case: {k: v for k, v in of.providers(case).items() if "compiled" not in k}  # noqa: E731
        return Family(of.make_inputs, of.expected, of.eager, kept)

    return family


def test_faults_are_recorded_and_never_timed(monkeypatch):
    builders = {
        "wrong": wrong,
        "broken": raising(ValueError("no such\nshape")),
        "absent": raising(Unavailable("no such op")),
        "base": wrong,  # the base layer computes something else and is not compared
        "right": right,
    }
    providing(monkeypatch, **builders)
    progress = Progress()
    measure(case(), BENCH, progress)
    found = progress.providers
    assert found["wrong"]["wrong"].startswith("y: error 7.07e-03")
    assert found["broken"] == {"failed": "ValueError: no such shape"}
    assert found["absent"] == {"unavailable": "no such op"}
    assert {name for name, entry in found.items() if "median_ms" in entry} == {"base", "right"}


def test_a_case_that_cannot_be_set_up_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch):
    def make_inputs(case, device):
        if case.rank == 2:
            raise torch.OutOfMemoryError("tried to allocate")

    truth = {"y": torch.ones(2, dtype=torch.float64)}
    family = Family(make_inputs, lambda i: truth, lambda i: truth, lambda case: {"ours": right})
    monkeypatch.setattr(bench.measure, "family_of", lambda case: family)
    assert measure_all([case(2), case(3)], tmp_path, BENCH, MACHINE, "r1", Budget(None)) == 0
    first, second = (records.read(records.path_of(tmp_path, case(rank))) for rank in (2, 3))
    assert (first["status"], first["error"]) == ("failed", "OutOfMemoryError: tried to allocate")
    assert second["status"] == "done"


@pytest.mark.usefixtures("no_release")
def test_finished_cases_are_passed_over_at_the_same_revision_alone(tmp_path, monkeypatch):
    built = []
    providing(monkeypatch, ours=lambda inputs: built.append(1) or right(inputs))
    for current, expected in (("r1", 2), ("r1", 2), ("r2", 4)):
        assert measure_all([case(2), case(3)], tmp_path, BENCH, MACHINE, current, Budget(None)) == 0
        assert len(built) == expected
    records.path_of(tmp_path, case(2)).write_text("{ torn")
    assert measure_all([case(2), case(3)], tmp_path, BENCH, MACHINE, "r2", Budget(None)) == 0
    assert len(built) == 5


@pytest.mark.usefixtures("no_release")
def test_no_case_is_begun_that_would_not_end_in_time(tmp_path, monkeypatch):
    now = [0.0]
    durations = iter([20.0, 40.0] + [5.0] * 8)
    budget = Budget(130.0, clock=lambda: now[0])

    def ours(inputs):
        now[0] += next(durations)
        return right(inputs)

    providing(monkeypatch, ours=ours)
    cases = [case(rank) for rank in range(2, 12)]
    # 110, 70, 65, ... 40 s are left: enough for another 40; of the 35 after that they are not.
    assert measure_all(cases, tmp_path, BENCH, MACHINE, "r1", budget) == 1
    assert budget.left() == pytest.approx(35.0)
    assert measure_all(cases, tmp_path, BENCH, MACHINE, "r1", Budget(FIRST_ESTIMATE_S - 1)) == 1
    assert measure_all(cases, tmp_path, BENCH, MACHINE, "r1", Budget(None)) == 0


def test_after_a_lost_device_the_case_goes_on_without_the_culprit(tmp_path, monkeypatch):
    providing(monkeypatch, culprit=raising(RuntimeError("illegal address")), ours=right)
    lost = lambda device, after: (_ for _ in ()).throw(DeviceLost(after))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(bench.measure, "check_alive", lost)
        with pytest.raises(DeviceLost):
            measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    left = records.read(records.path_of(tmp_path, case()))
    assert (left["status"], left["current"]) == ("running", None)
    record = measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    assert record["status"] == "done"
    assert record["providers"]["culprit"] == {"failed": "RuntimeError: illegal address"}
    assert "median_ms" in record["providers"]["ours"]


def test_a_provider_at_which_runs_were_stopped_twice_is_left_out(tmp_path, monkeypatch):
    providing(monkeypatch, slow=right, ours=right)
    stop(tmp_path, "r1", at="slow")
    stop(tmp_path, "r1", at="slow")
    record = measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    assert record["providers"]["slow"] == {"failed": "the run was stopped here 2 times"}
    assert "median_ms" in record["providers"]["ours"]


def test_one_stop_blames_nothing(tmp_path, monkeypatch):
    providing(monkeypatch, slow=right, ours=right)
    stop(tmp_path, "r1", at="slow")
    record = measure_one(case(), tmp_path, BENCH, MACHINE, "r1")
    assert "median_ms" in record["providers"]["slow"]


def test_stopped_twice_outside_any_provider_the_case_has_failed(tmp_path, monkeypatch):
    providing(monkeypatch, ours=right)
    stop(tmp_path, "r1", at="inputs")
    stop(tmp_path, "r1", at="inputs")
    assert measure_one(case(), tmp_path, BENCH, MACHINE, "r1")["error"] == "inputs: the run was stopped here 2 times"
    assert measure_all([case()], tmp_path, BENCH, MACHINE, "r1", Budget(None)) == 0


def test_main_measures_on_a_device_and_refuses_to_fall_back(tmp_path, monkeypatch, capsys):
    """On a CPU in place of the GPU: there ours must say why it cannot run instead of being eager PyTorch."""
    monkeypatch.setenv("CLORA_BACKEND", "auto")
    monkeypatch.setattr(bench.worker, "GPU", torch.device("cpu"))
    monkeypatch.setattr(bench.worker, "CudaStopwatch", lambda device: HostStopwatch())
    monkeypatch.setattr(bench.worker, "describe", lambda device, stopwatch: {"gpu": "CPU", "roof": BENCH.roof})
    monkeypatch.setattr(bench.worker, "revision", lambda: "r1")
    monkeypatch.setattr(bench.worker, "gpu_cases", lambda: [case(2), case(3)])
    monkeypatch.setattr(bench.measure, "family_of", without_compilers(bench.measure.family_of))
    assert bench.worker.main([str(tmp_path), "--only", "*-r3-*"]) == 0
    assert not records.path_of(tmp_path, case(2)).exists()
    providers = records.read(records.path_of(tmp_path, case(3)))["providers"]
    assert "median_ms" in providers["baddbmm"]
    assert providers["ours"]["failed"].startswith("CloraError: CLORA_BACKEND=triton, but multi_lora_linear cannot run")
    assert "1 of 1 cases finished" in capsys.readouterr().out


def test_main_tells_its_supervisor_of_a_lost_device(tmp_path, monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "auto")
    for name, value in {
        "CudaStopwatch": lambda device: None,
        "describe": lambda device, stopwatch: {"roof": {}},
        "measure_all": raising(DeviceLost("after ours")),
    }.items():
        monkeypatch.setattr(bench.worker, name, value)
    assert bench.worker.main([str(tmp_path)]) == bench.worker.DEVICE_LOST
