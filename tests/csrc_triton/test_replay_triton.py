"""Replayed calls: the same results to the bit, and a tape of its own for everything that a call's preparation depends on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from helpers.linear_cases import DEVICE, Case, assert_same, each_design, make, ours, results, upstream_of
from torch.utils._python_dispatch import TorchDispatchMode

from clora import ops
from clora.errors import CloraError
from csrc_triton import replay
from csrc_triton.multi_lora import designs, op
from csrc_triton.multi_lora.op import multi_lora_add_triton, multi_lora_linears
from csrc_triton.registration import INTERPRETED

SMALL = Case(5, 32, 16, 2, 4, [1, -1, 0])


@pytest.fixture(autouse=True)
def tapes(monkeypatch):
    """The tapes of the test, which begins without any."""
    kept = {}
    monkeypatch.setattr(replay, "_tapes", kept)
    return kept


def calls(design):
    """Calls that take different ways, by name, as functions of (x, weight, bias, lora_A, lora_B, scale, ids)."""
    linear = ours(design)
    return {
        "linear": linear,
        "without bias": lambda x, w, bias, *rest: linear(x, w, None, *rest),
        "three layers": lambda x, w, b, A, B, s, i: torch.cat(
            multi_lora_linears(x, [(w, b, A, B), (w * 2, None, A / 2, B * 2), (-w, b, -A, B / 2)], s, i, design), -1
        ),
        "layouts that are copied": lambda x, w, b, A, B, s, i: linear(
            x.mT.contiguous().mT, w.repeat(1, 2)[:, ::2], b, A, B.mT.contiguous().mT, s, i
        ),
        "add": lambda x, w, b, A, B, s, i: multi_lora_add_triton(torch.nn.functional.linear(x, w, b), x, A, B, s, i),
    }


def outcome(call, arguments, wanted):
    """Output and gradients of a call; without any, of a call that autograd does not see."""
    if not wanted:
        return {"y": call(*arguments)}
    tall = [arguments[0], arguments[1].new_empty(call(*arguments).shape[-1], 0)]
    return results(call, arguments, upstream_of(tall), wanted)


class Operators(TorchDispatchMode):
    """The names of PyTorch's operators that ran, without those that only look."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.detach.default:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


ways = pytest.mark.parametrize(
    ("name", "wanted"), [*((name, "xAB") for name in calls(None)), ("linear", ""), ("linear", "A"), ("linear", "B")]
)


@each_design
@ways
def test_a_replayed_call_equals_a_prepared_one_on_its_own_tensors(name, wanted, design, tapes, monkeypatch):
    call = calls(design)[name]
    outcome(call, make(SMALL), wanted)
    recorded = len(tapes)
    others = make(SMALL, seed=1)
    found = outcome(call, others, wanted)
    usual = name != "layouts that are copied"  # of these not everything is recorded
    assert len(tapes) == recorded >= (2 if wanted and usual else 1)
    monkeypatch.setattr(replay, "enabled", False)
    assert_same(found, outcome(call, others, wanted))


@each_design
@ways
def test_a_replayed_call_loses_no_operator(name, wanted, design, monkeypatch):
    """Whatever a call does to tensors without `replay.do` would be missing when it is replayed."""
    call, arguments = calls(design)[name], make(SMALL)
    monkeypatch.setattr(op, "is_traced", lambda x: False)  # the observer only counts
    outcome(call, arguments, wanted)
    seen = []
    for enabled in (True, False):
        monkeypatch.setattr(replay, "enabled", enabled)
        with Operators() as operators:
            outcome(call, arguments, wanted)
        seen.append(operators.names)
    assert seen[0] == seen[1]
    assert len(seen[0]) > 1


def test_a_tensor_that_is_given_twice_is_two_tensors_of_the_next_call():
    x, w, b, A, B, s, i = make(SMALL)
    others = [make(SMALL, seed=seed)[1:5] for seed in (1, 2)]
    multi_lora_linears(x, [(w, b, A, B)] * 2, s, i)
    for y, layer in zip(multi_lora_linears(x, others, s, i), others, strict=True):
        assert torch.equal(y, multi_lora_linears(x, [layer], s, i)[0])


def shifted(tensor):
    """The same values one element further, no longer at a multiple of 16 bytes."""
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


def wider(tensor):
    """The same values, every second of a wider row."""
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


OTHER_LAYOUTS = {
    "other strides of x": lambda a: [a[0].mT.contiguous().mT, *a[1:]],
    "wider rows of x": lambda a: [wider(a[0]), *a[1:]],
    "other strides of the weight": lambda a: [a[0], a[1].mT.contiguous().mT, *a[2:]],
    "x is not aligned": lambda a: [shifted(a[0]), *a[1:]],
    "the factor is not aligned": lambda a: [*a[:4], shifted(a[4]), *a[5:]],
    "other strides of the factor": lambda a: [*a[:3], wider(a[3]), *a[4:]],
    "factors of 16 bits": lambda a: [*a[:3], a[3].half(), a[4].half(), *a[5:]],
    "ids of 32 bits": lambda a: [*a[:6], a[6].int()],
    "strengths of 16 bits": lambda a: [*a[:5], a[5].half(), a[6]],
    "without bias": lambda a: [*a[:2], None, *a[3:]],
    "fewer samples": lambda a: [a[0][:2], *a[1:6], a[6][:2]],
}


@each_design
@pytest.mark.parametrize("change", OTHER_LAYOUTS)
def test_another_layout_has_a_tape_of_its_own(change, design, tapes, monkeypatch):
    arguments = make(SMALL)
    ours(design)(*arguments)
    (key,) = tapes
    changed = OTHER_LAYOUTS[change](arguments)
    found = [ours(design)(*changed) for _ in range(2)]
    assert len(tapes) == 2
    assert key in tapes
    monkeypatch.setattr(replay, "enabled", False)
    expected = ours(design)(*changed)
    assert all(torch.equal(y, expected) for y in found)


def test_a_call_that_autograd_must_see_is_never_taken_for_one_that_it_need_not():
    x, w, b, A, B, s, i = make(SMALL)
    call = ours("split")
    assert not call(x, w, b, A, B, s, i).requires_grad
    trained = A.clone().requires_grad_()
    assert call(x, w, b, trained, B, s, i).requires_grad
    with torch.no_grad():
        assert not call(x, w, b, trained, B, s, i).requires_grad
    assert call(x, w, b, trained, B, s, i).requires_grad
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="jvp"):
            call(dual, w, b, A, B, s, i)


OTHER_CALLS = {
    "a trained weight": (1, lambda w: w.clone().requires_grad_(), "weight require"),
    "another dtype": (3, lambda A: A.double(), "float64"),
    "another device": (1, lambda w: w.to("meta"), "weight is on meta"),
    "another shape": (5, lambda s: s[:1], "scale"),
    "ids that are no integers": (6, lambda i: i.float(), "int32 or int64"),
}


@pytest.mark.parametrize("change", OTHER_CALLS)
def test_a_call_beyond_the_kernels_is_noticed_after_one_that_is_not(change, monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    position, change, message = OTHER_CALLS[change]
    arguments = make(SMALL)
    y = ops.multi_lora_linear(*arguments)
    others = [*arguments[:position], change(arguments[position]), *arguments[position + 1 :]]
    with pytest.raises((CloraError, ValueError), match=message):
        ops.multi_lora_linear(*others)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(CloraError, match="autocast"):
        ops.multi_lora_linear(*arguments)
    assert torch.equal(ops.multi_lora_linear(*arguments), y)


def test_a_weight_that_asks_for_gradients_is_covered_where_none_are_made(monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    arguments = make(SMALL)
    arguments[1].requires_grad_()
    with torch.no_grad():
        ops.multi_lora_linear(*arguments)
    with pytest.raises(CloraError, match="weight require gradients"):
        ops.multi_lora_linear(*arguments)


def test_a_recorded_call_is_not_checked_again(monkeypatch):
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    arguments = make(SMALL)
    y, x = torch.randn(len(arguments[0]), SMALL.tokens, SMALL.outputs, device=DEVICE), arguments[0]
    expected = ops.multi_lora_linear(*arguments), ops.multi_lora_add(y, x, *arguments[3:])
    monkeypatch.setattr(op, "unsupported", None)
    monkeypatch.setattr(op, "unsupported_add", None)
    assert torch.equal(ops.multi_lora_linear(*arguments), expected[0])
    assert torch.equal(ops.multi_lora_add(y, x, *arguments[3:]), expected[1])


ROWS = Case(32, 16, 16, 2, 4, [1, 1, 0, -1])
"""Sizes of which a CPU merges an adapter of one sample: 32 rows."""


def routed(arguments, adapters, strengths, **options):
    """The op with adapters of samples as a bank calls it."""
    ids = torch.tensor(adapters, device=DEVICE)
    return ops.multi_lora_linear(
        *arguments[:6], ids, runs=ops.runs_of(adapters), strengths=strengths, backend="triton", **options
    )


@pytest.fixture
def choices(monkeypatch):
    """The runs and strengths for which the choice of the merged adapters was made, of a test that begins without any."""
    made, own = [], op.merged_in_all

    def merged_in_all(x, projections, runs, strengths, design):
        made.append((runs, *strengths))
        return own(x, projections, runs, strengths, design)

    monkeypatch.setattr(op, "merged_in_all", merged_in_all)
    monkeypatch.setattr(replay, "_tapes", {})
    return made


WEAK, STRONG = (0.001, 0.001), (0.001, 0.9)


@pytest.fixture
def few_rows(monkeypatch):
    """Merges every adapter of 32 rows or more that is exact enough."""
    monkeypatch.setattr(designs, "rows_to_merge", lambda shape, device: 32)
    designs.adapters_to_merge.cache_clear()
    yield
    designs.adapters_to_merge.cache_clear()


@pytest.mark.usefixtures("few_rows")
def test_the_merged_adapters_of_a_recorded_call_are_chosen_once(choices):
    arguments = make(ROWS, torch.float16, torch.float16)
    for _ in range(3):
        routed(arguments, ROWS.ids, WEAK)
    assert choices == [(ops.runs_of(ROWS.ids), WEAK)]
    routed(arguments, [0, 1, 1, -1], WEAK)
    routed(arguments, ROWS.ids, STRONG)
    assert choices[1:] == [(ops.runs_of([0, 1, 1, -1]), WEAK), (ops.runs_of(ROWS.ids), STRONG)]


@pytest.mark.usefixtures("few_rows")
def test_recorded_calls_merge_what_prepared_ones_do(choices, monkeypatch):
    arguments = make(ROWS, torch.float16, torch.float16)
    calls = [(ids, own) for ids in (ROWS.ids, [-1] * 4, [0, 0, 0, 0]) for own in (WEAK, STRONG, None)]
    found = [[routed(arguments, *call) for call in calls] for _ in range(3)][-1]
    monkeypatch.setattr(replay, "enabled", False)
    expected = [routed(arguments, *call) for call in calls]
    assert all(torch.equal(y, other) for y, other in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1]), "the strong adapter is merged"
    assert len(choices) == len(calls)


def test_the_choices_that_are_kept_are_bounded(choices, monkeypatch):
    monkeypatch.setattr(op, "MAX_CHOICES", 3)
    arguments = make(SMALL)
    for i in range(9):
        routed(arguments, SMALL.ids, (0.1, i / 10))
        assert all(len(tape.choices) <= 3 for tape in replay._tapes.values())
    assert len(choices) == 8  # the first call was not recorded yet


def test_tapes_keep_no_tensor():
    import weakref

    arguments = make(SMALL)
    y = ours("split")(*arguments)
    kept = [weakref.ref(tensor) for tensor in (*arguments, y)]
    del arguments, y
    assert not any(reference() is not None for reference in kept)


def test_what_is_kept_is_bounded(monkeypatch, tapes):
    monkeypatch.setattr(replay, "MAX_TAPES", 3)
    for tokens in range(1, 9):
        ours("split")(*make(SMALL._replace(tokens=tokens)))
        assert len(tapes) <= 3


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take pointers of any tensor that begins there")
def test_a_call_that_uses_an_unknown_tensor_is_prepared_each_time(tapes):
    def doubled(x):
        return [replay.do(torch.add, x, x * 2)]  # the product is not recorded

    for value in (1.0, 2.0):
        (y,) = replay.replayed(doubled, (torch.full((2,), value, device=DEVICE),))
        assert y.tolist() == [3 * value] * 2
    assert not tapes
