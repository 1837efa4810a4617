"""RESULTS.md, the goals and the table of designs, from records made here."""

from __future__ import annotations

import json

import pytest

from bench import design_table, records
from bench.cases import AddCase, DesignCase, LinearCase, LossCase, StackCase
from bench.goals import goals, verdicts
from bench.report import report, summary, write_report
from csrc_triton.multi_lora import designs

MACHINE = {
    "gpu": "Some GPU",
    "capability": [9, 0],
    "commit": "abc",
    "driver": "1.2",
    "python": "3.12",
    "torch": "2.11",
    "cuda": "13.0",
    "triton": "3.6",
    "peft": "0.21",
    "roof": {"tflop_per_s": 780.4, "gb_per_s": 4300.0},
}


def linear(k=3072, n=3072, mode="forward", adapters=1, rank=64, samples=2, tokens=4096):
    return LinearCase(
        mode=mode, in_features=k, out_features=n, samples=samples, tokens=tokens, adapters=adapters, rank=rank
    )


def record(case, revision="r1", machine=MACHINE, **times):
    """A finished record with these medians in ms; anything but a number is the provider's entry itself."""
    entry = {"p10_ms": 0.9, "p90_ms": 1.1, "host_ms": 0.05, "rounds": 30, "roof_percent": 50.0, "peak_mib": 10.0}
    providers = {
        name: {**entry, "errors": {"gradient": 1e-7}, "median_ms": value} if isinstance(value, float) else value
        for name, value in times.items()
    }
    base = {**records.begin(case, revision, [], None), "machine": machine, "providers": providers}
    return json.loads(json.dumps({**base, "status": "done"}))


def outcome(found, title, shape=(3072, 3072)):
    (verdict,) = [v for v in verdicts(found) if v.goal.title == title and v.goal.shape in (shape, None)]
    return verdict.met, verdict.worst


def row(text, *words):
    """The table rows of a report that hold all of these words."""
    return [line for line in text.splitlines() if line.startswith("|") and all(word in line for word in words)]


@pytest.mark.parametrize(("ours", "met"), [(1.11, True), (1.13, False)])
def test_goal_over_the_base_layer(ours, met):
    assert outcome([record(linear(), base=1.0, ours=ours)], "forward, rank 64, over the base layer") == (
        met,
        ours,
    )


@pytest.mark.parametrize(
    ("title", "case", "other", "limit"),
    [
        ("forward, 4 and more adapters, PEFT mixed over ours", linear(adapters=8), "peft_mixed", 1.5),
        ("forward, one adapter, PEFT over ours", linear(), "peft", 1.25),
        ("forward, one adapter, compiled PEFT over ours", linear(), "peft_compiled", 1.12),
        ("student, forward and backward, PEFT over ours", linear(mode="student"), "peft", 1.20),
        ("loss, fp64 eager over ours", LossCase(samples=4), "paper_fp64", 10.0),
        ("loss, torch.compile over ours", LossCase(samples=4), "compiled", 1.0),
        ("loss, its gradient compiled too, over ours", LossCase(samples=4), "compiled_returned", 1.0),
        ("stack, PEFT mixed over ours", StackCase(), "peft_mixed", 1.0),
        ("stack, PEFT switched per sample over ours", StackCase(), "peft_switch", 1.0),
    ],
)
def test_goals_over_others(title, case, other, limit):
    for factor, met in ((1.001, True), (0.999, False)):
        found = [record(case, ours=1.0, **{other: limit * factor})]
        assert outcome(found, title)[0] is met
    assert outcome([], title) == (None, None)
    assert outcome([record(case, ours=1.0)], title) == (None, None)


def test_the_issues_limits_by_shape():
    limits = [[goal.limit for goal in goals()[i : i + 3]] for i in range(0, 15, 3)]
    assert limits == [[1.12, 1.07, 1.10], [1.5, 1.5, 1.2], [1.25, 1.25, 1.06], [1.12, 1.12, 1.03], [1.20, 1.15, 1.10]]
    assert [goal.shape for goal in goals()[:3]] == [(3072, 3072), (3072, 12288), (12288, 3072)]


def test_a_goal_is_met_where_every_case_meets_it():
    found = [record(linear(), peft=2.0, ours=1.0), record(linear(rank=16), peft=1.2, ours=1.0)]
    met, worst = outcome(found, "forward, one adapter, PEFT over ours")
    assert (met, worst) == (False, pytest.approx(1.2))


def test_our_own_designs_and_the_base_are_no_others():
    found = [record(linear(), base=0.5, ours=1.0, ours_fused=0.7, baddbmm=0.99, merged=1.3)]
    met, worst = outcome(found, "ours over the fastest other provider")
    assert (met, worst) == (True, pytest.approx(1 / 0.99))


def test_memory_and_gradient_error():
    peaks = {"median_ms": 1.0, "peak_mib": 11.0}
    found = [record(linear(), ours=peaks, peft=1.0)]
    assert outcome(found, "peak memory over PEFT's") == (False, pytest.approx(1.1))
    off = {"median_ms": 1.0, "errors": {"gradient": 2e-5}}
    assert outcome([record(LossCase(samples=1), ours=off)], "loss, error of the gradient against fp64")[0] is False


def test_the_low_rank_part_alone_has_goals_and_figures_of_its_own():
    case = AddCase(**vars(linear()))
    found = [record(case, base=0.5, ours=1.03, baddbmm=1.0, peft=2.0)]
    found[0]["providers"]["peft"]["peak_mib"] = 9.0
    assert outcome(found, "low-rank part, ours over the fastest other provider") == (False, pytest.approx(1.03))
    assert outcome(found, "low-rank part, peak memory over PEFT's") == (False, pytest.approx(10 / 9))
    assert outcome(found, "ours over the fastest other provider") == (None, None)
    assert outcome(found, "forward, one adapter, PEFT over ours") == (None, None)
    text = report(found)
    assert row(text.partition("## Low-rank part")[2], "add-forward-3072x3072", "base", "0.5000")
    assert row(text, "add-forward-3072x3072", "baddbmm 1.0000", "1.030")
    assert designs_of(record(case, ours_fused=1.0, ours_split=2.0)) == []


def test_report_of_goals_losses_figures_and_faults(tmp_path):
    found = [
        record(linear(), base=1.0, peft=1.4, ours=1.11, merged={"wrong": "y: error 1"}),
        record(linear(k=12288), base=1.0, baddbmm=1.05, ours=1.10),
        record(LossCase(samples=4), paper_fp64=0.5, ours=0.01, compiled={"failed": "RuntimeError: no"}),
        {**record(StackCase()), "status": "failed", "error": "OutOfMemoryError: 1 GiB"},
        {**record(linear(rank=16), ours=9.0), "status": "running"},
    ]
    for each in found:
        records.write(tmp_path / f"{each['name']}.json", each)
    entry = {"outcome": "failed", "summary": "1 failed", "failures": ["FAILED a"], "seconds": 12.3}
    records.write(tmp_path / "tasks.json", {"tests": entry | {"machine": {**MACHINE, "revision": "r1"}}})
    text = write_report(tmp_path).read_text()
    assert "Some GPU, commit abc, driver 1.2, python 3.12, torch 2.11" in text
    assert "revision r1; 4 cases" in text
    assert "780 TFLOP/s" in text
    assert row(text, "| tests | failed | 12 | Some GPU | abc | r1 | 1 failed |")
    assert "- `FAILED a`" in text
    (goal,) = row(text, "over the base layer", "3072 -> 3072")
    assert "| at most 1.120 | 1.110 | 1 | met |" in goal
    assert row(text, "compiled PEFT", "not measured")
    (slower,) = row(text, "baddbmm 1.0500")
    assert "1.048" in slower
    assert row(text, "ours over the fastest other", "**not met**")
    assert row(text, "linear-forward-3072x3072", "base", "1.0000", "0.9000 to 1.1000", "50 %")
    assert row(text, "merged", "wrong: y: error 1")
    assert row(text, "compiled", "failed: RuntimeError: no")
    assert row(text, "the whole case", "OutOfMemoryError: 1 GiB", "stack-")
    assert "9.0" not in text  # the case that is still running is not reported


def test_report_of_nothing():
    text = report([])
    assert "Nothing was measured yet." in text
    assert "Tasks: none was run." in text


def test_designs_are_shown_over_the_base_layer():
    case = DesignCase(**vars(linear()), factors="float32")
    for text in (
        report([record(case, base=2.0, ours_fused=2.2, ours_split={"wrong": "y"})]),
        summary([record(case, base=2.0, ours_fused=2.2)]),
    ):
        assert row(text, "case, over the base layer", "fused")
        assert row(text, f"| {case.name} | 1.100 |")


def test_the_summary_has_the_goals_that_were_measured():
    text = summary([record(linear(), base=1.0, ours=1.11)])
    assert row(text, "over the base layer", "3072 -> 3072", "met")
    assert "not measured" not in text


def test_machines_that_differ_are_told_apart():
    other = {**MACHINE, "driver": "1.3"}
    text = report([record(linear(), ours=1.0), record(linear(rank=16), machine=other, revision="r2", ours=1.0)])
    assert "driver 1.2" in text
    assert "driver 1.3" in text
    assert "revision r2; 1 cases" in text


def designs_of(*found):
    return design_table.entries_of(found)


def test_designs_are_the_faster_ones_and_the_op_reads_them(monkeypatch):
    found = [
        record(linear(samples=4, tokens=1024), ours_fused=1.0, ours_split=0.9),
        record(linear(samples=4, tokens=2048), ours_fused=1.0, ours_split=1.1),
        record(linear(samples=2, tokens=4096), ours_fused=1.0, ours_split=1.2),
        record(linear(k=12288, samples=2, tokens=4096), ours_fused=1.2, ours_split=1.0),
    ]
    table = designs_of(*found)
    assert [(e["in_features"], e["min_tokens"], e["design"]) for e in table] == [
        (3072, 1024, "split"),
        (3072, 2048, "fused"),
        (12288, 4096, "split"),
    ]

    monkeypatch.setattr(designs, "_table", lambda: {"measured": table})
    predicted = designs.overhead  # the model: split, whatever the shape
    monkeypatch.setattr(designs, "overhead", lambda design, *rest: predicted("split", *rest) + (design == "fused"))
    designs._exact_designs.cache_clear()

    def chosen(tokens, k=3072, rank=64, capability=(9, 0), triton="3.6.1"):
        shape = designs.Shape(k, 3072, rank, "bfloat16")
        return designs.exact_design(tokens, shape, designs.gpu_device(capability, triton))

    assert [chosen(tokens) for tokens in (512, 1024, 2047, 2048, 8192)] == ["split"] * 3 + ["fused"] * 2
    assert [chosen(4096, rank=40), chosen(4096, rank=16), chosen(4096, k=12288)] == ["fused", "split", "split"]
    assert chosen(4096, capability=(8, 0)) == "split"
    assert [chosen(4096, triton=version) for version in ("3.6.0+git1", "3.7.0", "3.60")] == ["fused", "split", "split"]
    designs._exact_designs.cache_clear()


def test_the_number_of_samples_does_not_choose():
    few, many = (record(linear(samples=b), ours_fused=f, ours_split=1.0) for b, f in ((1, 1.1), (8, 0.8)))
    assert [entry["design"] for entry in designs_of(few, many)] == ["fused"]


def design(rows, adapters=1, rank=64, factors="bfloat16", **times):
    case = linear(samples=adapters, tokens=rows, adapters=adapters, rank=rank)
    return record(DesignCase(**vars(case), factors=factors), **{f"ours_{name}": ms for name, ms in times.items()})


@pytest.mark.parametrize(
    ("ratios", "least"),
    [
        ({1024: 1.2, 4096: 0.9, 8192: 0.8}, 4096),
        ({1024: 0.9, 4096: 1.1, 8192: 0.9}, 8192),
        ({1024: 0.9, 8192: 1.1}, None),
    ],
)
def test_merged_stands_from_the_rows_on_from_which_it_is_always_the_fastest(ratios, least, monkeypatch):
    table = designs_of(*[design(rows, adapters=2, merged=ms, fused=1.0, split=1.05) for rows, ms in ratios.items()])
    assert [entry["min_rows"] for entry in table if "min_rows" in entry] == [least]
    monkeypatch.setattr(designs, "_table", lambda: {"measured": table})
    designs.rows_to_merge.cache_clear()
    gpu, shape = designs.gpu_device((9, 0), "3.6.1"), designs.Shape(3072, 3072, 64, "bfloat16")
    assert designs.rows_to_merge(shape, gpu) == (float("inf") if least is None else least)
    designs.rows_to_merge.cache_clear()


def test_merged_is_compared_with_the_faster_exact_design():
    (entry,) = [e for e in designs_of(design(4096, merged=1.0, fused=1.1, split=0.9)) if "min_rows" in e]
    assert entry["min_rows"] is None


def test_factors_of_another_dtype_than_the_layers_choose_nothing():
    assert designs_of(design(4096, factors="float32", merged=1.0, fused=1.1, split=0.9)) == []


def test_what_has_no_times_of_both_designs_is_left_out():
    assert designs_of(record(linear(), ours_fused=1.0), record(LossCase(samples=1), ours=1.0)) == []
    assert designs_of(record(linear(mode="student"), ours_fused=1.0, ours_split=2.0)) == []


def test_other_gpus_and_other_triton_releases_keep_their_entries(tmp_path, monkeypatch):
    table = tmp_path / "designs.json"
    old = [
        {"device": "sm_80", "triton": "3.6", "design": "fused"},
        {"device": "sm_90", "triton": "3.7", "design": "fused"},
        {"device": "sm_90", "triton": "3.6", "design": "fused"},
    ]
    precision = {"bound": 0.02, "bfloat16": 0.0017}
    table.write_text(json.dumps({"precision": precision, "measured": old}))
    monkeypatch.setattr(design_table, "TABLE", table)
    records.write(tmp_path / "one design" / "a.json", record(linear(), ours_fused=2.0))
    assert design_table.main([str(tmp_path / "one design")]) == 1
    assert json.loads(table.read_text())["measured"] == old
    measured = record(linear(), ours_fused=2.0, ours_split=1.0)
    records.write(tmp_path / "results" / f"{measured['name']}.json", measured)
    assert design_table.main([str(tmp_path / "results")]) == 0
    assert json.loads(table.read_text())["precision"] == precision
    written = json.loads(table.read_text())["measured"]
    assert written[:2] == old[:2]
    assert written[2:] == design_table.entries_of([measured])
    assert (written[2]["triton"], written[2]["design"]) == ("3.6", "split")
