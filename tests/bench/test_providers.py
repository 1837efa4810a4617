"""Every provider that runs on a CPU computes its case: tiny shapes in fp32 against fp64, gradients included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import add, gate, linear, loss, stack
from bench.cases import AddCase, LinearCase, LossCase, StackCase
from bench.measure import family_of
from bench.providers import BASE, Unavailable

CPU = torch.device("cpu")
MIXED = LinearCase(
    mode="forward", in_features=12, out_features=10, samples=5, tokens=3, adapters=3, rank=4, dtype="float32"
)
ONE = replace(MIXED, adapters=1)
CASES = {
    "mixed": MIXED,
    "mixed_without_bias": replace(MIXED, bias=False),
    "one": ONE,
    "student": replace(ONE, mode="student"),
    "add_mixed": AddCase(**vars(MIXED)),
    "add_one": AddCase(**vars(ONE)),
    "add_student": AddCase(**vars(replace(ONE, mode="student"))),
    "loss": LossCase(samples=5, latent=(3, 4, 5)),
    "loss_without_anchors": LossCase(samples=2, latent=(3, 4)),
    "stack": StackCase(blocks=2, heads=2, head_size=8, samples=3, tokens=5, adapters=2, rank=3, dtype="float32"),
}
ON_GPU_ALONE = {"ours_fused", "grouped_mm"}
PARAMETERS = [
    pytest.param(case, name, id=f"{case_name}-{name}")
    for case_name, case in CASES.items()
    for name in family_of(case).providers(case)
    if name != BASE and "compiled" not in name and name not in ON_GPU_ALONE
]


@pytest.mark.parametrize(("case", "provider"), PARAMETERS)
def test_computes_the_case(case, provider):
    family = family_of(case)
    inputs = family.make_inputs(case, CPU)
    if isinstance(case, LinearCase):  # none is 1, so that a forgotten scale shows
        inputs = replace(inputs, scales=tuple(scale + 0.5 for scale in inputs.scales))
    expected = family.expected(inputs)
    call = family.providers(case)[provider](inputs)
    first, second = call(), call()
    for outputs in (first, second):  # a call must not depend on how often it was made
        assert gate.violation(gate.errors(outputs, expected), dict.fromkeys(expected, 1e-6)) is None
    assert not any(output.requires_grad for output in first.values())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_eager_definition_agrees_with_the_independent_truth(case):
    family = family_of(case)
    inputs = family.make_inputs(case, CPU)
    found = gate.errors(family.eager(inputs), family.expected(inputs))
    assert all(0 <= error < 1e-6 for error in found.values()), found


@pytest.mark.parametrize("name", ["mixed", "student", "add_mixed", "add_student", "stack"])
def test_base_leaves_the_adapters_out(name):
    """So that the gate would stop a provider which did."""
    family = family_of(CASES[name])
    inputs = family.make_inputs(CASES[name], CPU)
    outputs = family.providers(CASES[name])[BASE](inputs)()
    assert gate.errors(outputs, family.expected(inputs))["y"] > 0.1


def test_inputs_show_every_mistake_in_the_routing():
    inputs = linear.make_inputs(MIXED, CPU)
    assert inputs.ids == (0, 1, 2, 0, 1)
    assert len(set(inputs.scales)) == 3
    swapped = replace(inputs, ids=(1, 0, 2, 0, 1))
    assert gate.errors(linear.eager(swapped), linear.expected(inputs))["y"] > 0.1
    unscaled = replace(inputs, scales=(1.0,) * 3)
    assert gate.errors(linear.eager(unscaled), linear.expected(inputs))["y"] > 0.05


@pytest.mark.parametrize(
    ("case", "provider"),
    [(MIXED, "ours_fused"), (MIXED, "grouped_mm"), (CASES["add_mixed"], "grouped_mm")],
)
def test_what_needs_a_gpu_says_so(case, provider):
    family = family_of(case)
    with pytest.raises(Unavailable, match="needs a GPU, the tensors are on cpu"):
        family.providers(case)[provider](family.make_inputs(case, CPU))


def test_the_op_is_called_as_the_trainer_calls_it():
    """Which samples share an adapter is known, and how strong a frozen adapter is; nothing of one that trains."""
    inputs = linear.make_inputs(MIXED, CPU)
    assert [(run.adapter, run.start, run.stop) for run in inputs.routing["runs"]] == [
        (e, sample, sample + 1) for sample, e in enumerate(inputs.ids)
    ]
    delta = inputs.scales[2] * inputs.lora_B[2] @ inputs.lora_A[2]
    assert inputs.routing["strengths"][2] == pytest.approx(float(delta.norm() / inputs.weight.norm()), rel=1e-5)
    assert linear.make_inputs(CASES["student"], CPU).routing["strengths"] is None


def test_peft_copies_no_weight():
    inputs = linear.make_inputs(MIXED, CPU)
    layer = linear._peft_layer(inputs)
    assert layer.base_layer.weight.data_ptr() == inputs.weight.data_ptr()
    assert layer.lora_A["a2"].weight.data_ptr() == inputs.lora_A[2].data_ptr()
    assert [layer.scaling[f"a{e}"] for e in range(3)] == [1.0, 1.25, 1.5]


@pytest.mark.parametrize("name", ["add_mixed", "add_one", "add_student"])
def test_the_output_of_the_layer_is_given_and_stays(name):
    inputs = replace(add.make_inputs(CASES[name], CPU), weight=torch.full((10, 12), torch.nan))
    before = inputs.y.clone()
    assert before.isfinite().all()
    for provider in add.providers(CASES[name]):
        if provider not in ON_GPU_ALONE and "compiled" not in provider:
            assert add.providers(CASES[name])[provider](inputs)()["y"].isfinite().all()
            assert torch.equal(inputs.y, before), provider


def test_every_linear_layer_of_the_stack_is_adapted():
    inputs = stack.make_inputs(CASES["stack"], CPU)
    assert len(inputs.factors) == 2 * len(stack.LAYERS)
    for name, (a, b) in inputs.factors.items():
        without = replace(inputs, factors={**inputs.factors, name: (a, torch.zeros_like(b))})
        assert gate.errors(stack.eager(without), stack.expected(inputs))["y"] > 1e-3


def test_paper_loss_drops_absent_kinds():
    case = LossCase(samples=1, latent=(2, 3))
    inputs = loss.make_inputs(case, CPU)
    assert inputs.anchor_target.shape == (0, 2, 3)
    assert gate.errors(loss.providers(case)["paper_fp64"](inputs)(), loss.expected(inputs))["gradient"] < 1e-6
