"""The list of cases: contents and order."""

from __future__ import annotations

from bench.cases import (
    FLUX2_KLEIN,
    QWEN_IMAGE,
    AddCase,
    LinearCase,
    LossCase,
    adapter_of,
    cpu_cases,
    design_cases,
    gpu_cases,
    rows_per_adapter,
    telling_cases,
)


def test_names_are_unique_and_files():
    names = [case.name for case in gpu_cases() + design_cases() + cpu_cases()]
    assert len(names) == len(set(names))
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


def test_the_goals_come_first():
    first = telling_cases()
    assert gpu_cases()[: len(first)] == first
    linear = [(c.mode, c.adapters, c.rank, (c.in_features, c.out_features)) for c in first[:9]]
    settings = [("forward", 1, 64), ("forward", 4, 64), ("student", 1, 64)]
    assert linear == [(*setting, shape) for setting in settings for shape in QWEN_IMAGE]
    assert [(c.samples, c.dtype) for c in first[9:12]] == [(1, "float32"), (4, "float32"), (16, "float32")]
    (stack,) = first[12:]
    assert (stack.samples, stack.adapters, stack.hidden, stack.blocks) == (8, 6, 3072, 4)


def test_every_combination_is_there():
    linear = [case for case in gpu_cases() if type(case) is LinearCase]
    assert {(c.mode, c.adapters) for c in linear} == {("forward", e) for e in (1, 2, 4, 8)} | {("student", 1)}
    assert {c.rows for c in linear} == {4096, 8192, 16384, 32768}
    assert {c.rank for c in linear} == {16, 64, 128}
    assert {(c.in_features, c.out_features) for c in linear} == {*QWEN_IMAGE, *FLUX2_KLEIN}
    assert len(linear) == 5 * 4 * 3 * 6
    for case in linear:
        assert case.samples * case.tokens == case.rows
        assert set(adapter_of(case)) == set(range(case.adapters))


def test_the_low_rank_part_comes_after_the_goals_and_by_the_same_order():
    cases = gpu_cases()[len(telling_cases()) + 3 :]  # behind the losses in bf16
    adds = [case for case in cases if isinstance(case, AddCase)]
    assert cases[:9] == adds[:9]
    telling = [(c.mode, c.adapters, c.rows, (c.in_features, c.out_features)) for c in adds[:9]]
    settings = [("forward", 1, 8192), ("forward", 4, 16384), ("student", 1, 8192)]
    assert telling == [(*setting, shape) for setting in settings for shape in QWEN_IMAGE]
    assert {(c.mode, c.adapters, c.rows) for c in adds} == set(settings)
    assert {c.rank for c in adds} == {16, 64, 128}
    assert {(c.in_features, c.out_features) for c in adds} == {*QWEN_IMAGE, *FLUX2_KLEIN}
    assert len(adds) == 3 * 6 * 3
    assert {c.rank for c in adds[:9]} == {64}


def test_kinds_of_a_loss_are_in_the_order_that_the_op_takes():
    assert LossCase(samples=1).kinds == (0,)
    assert LossCase(samples=4).kinds == (0, 0, 1, 2)
    assert LossCase(samples=16).kinds == (0,) * 6 + (1,) * 5 + (2,) * 5


def test_designs_are_compared_on_sorted_batches_of_few_and_many_rows_per_adapter():
    cases = design_cases()
    assert {(c.in_features, c.out_features) for c in cases} == {*QWEN_IMAGE}
    assert {c.rank for c in cases} == {16, 64, 128}
    assert {rows_per_adapter(c) for c in cases if c.mode == "forward"} == {1024, 4096, 8192, 32768}
    assert {c.factors for c in cases if c.mode == "student"} == {"float32"}
    assert all(adapter_of(c) == sorted(adapter_of(c)) and set(adapter_of(c)) == {*range(c.adapters)} for c in cases)
