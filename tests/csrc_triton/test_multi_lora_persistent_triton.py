"""The persistent kernel of design "fused", which GPUs with hardware copies (TMA) take wherever rows are aligned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from helpers.linear_cases import (
    DEVICE,
    DTYPES,
    Case,
    assert_as_accurate_as_eager,
    assert_same,
    interpreted,
    launches,
    make,
    ours,
    results,
    upstream_of,
)

from clora.bank.bank import AdapterBank
from clora.lora.state import LoRAModule, LoRAState
from csrc_triton import replay
from csrc_triton.multi_lora import launch
from csrc_triton.multi_lora.op import multi_lora_linears
from csrc_triton.multi_lora.reference import multi_lora_linear
from csrc_triton.multi_lora.tiles import Machine
from csrc_triton.registration import INTERPRETED

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CASES = {
    "tails": Case(70, 48, 80, 3, 32, [2, -1, 0, 0, 1]),  # of tokens, inputs, outputs and ranks
    "several_rank_blocks": Case(5, 32, 48, 2, 208, [1, 0]),
    "wide_rank": Case(150, 48, 80, 2, 80, [1, -1]),  # shrunk by 128 rows in 16 bits
    "several_groups": Case(1100, 16, 80, 2, 16, [1, -1]),  # more than 8 row tiles
    "several_column_tiles": Case(20, 32, 528, 2, 16, [-1, 1]),
    "one_token": Case(1, 32, 16, 2, 16, [1, -1, 0]),
}


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """Sets the number of programs: 3 at first, fewer than there are tiles."""

    def set_number(number):
        monkeypatch.setattr(launch, "machine_of", lambda device: Machine(232448, True, number))

    set_number(3)
    return set_number


@pytest.mark.parametrize(
    ("name", "dtype"),
    # On a GPU the tails in every dtype, the others in one: each case has tiles of its own, which are compiled.
    [(n, d) for n in CASES for d in DTYPES if INTERPRETED or n == "tails" or d == DTYPES[-1]],
    ids=str,
)
def test_it_is_as_accurate_as_eager(monkeypatch, name, dtype):
    seen = launches(monkeypatch)
    assert_as_accurate_as_eager(ours("fused"), make(CASES[name], dtype))
    kernels = [kernel for kernel, _ in seen]
    assert kernels.count("fused_kernel") == 2, "y and dx"
    assert "linear_kernel" not in kernels


@pytest.mark.parametrize("change", [{"inputs": 44}, {"outputs": 84}, {"rank": 20}], ids=str)
def test_rows_that_are_not_aligned_take_pointers(monkeypatch, change):
    seen = launches(monkeypatch)
    assert_as_accurate_as_eager(ours("fused"), make(CASES["tails"]._replace(**change), torch.float16))
    assert not [kernel for kernel, _ in seen if kernel == "fused_kernel"]


@pytest.mark.parametrize("pages", [None, 2])
def test_loras_of_any_rank_take_hardware_copies_in_a_bank_of_16_bits(monkeypatch, pages):
    """Also those of layers that share an input, whose ranks stand side by side."""
    monkeypatch.setenv("CLORA_BACKEND", "triton")
    monkeypatch.setenv("CLORA_DESIGN", "fused")
    ranks = {"to_q": 5, "to_k": 12, "to_v": 3}
    layers, modules, projections = nn.Module(), {}, []
    for i, (name, rank) in enumerate(ranks.items()):
        given = make(Case(20, 48, 80, 1, rank, [0, -1]), torch.float16, torch.float16, seed=i)
        x, weight, bias, a, b = given[:5]
        layer = nn.Linear(48, 80)
        layer.weight.data, layer.bias.data = weight, bias
        layers.add_module(name, layer.requires_grad_(False))
        modules[name] = LoRAModule(a[0], b[0])
        projections.append((weight, bias, a, b))
    seen = launches(monkeypatch)
    with AdapterBank(layers, {"lora": LoRAState(modules)}, pages=pages) as bank, torch.no_grad():
        with bank.placed(torch.tensor([0])) as slots, bank.route(slots, [0, -1]):
            found = [layers.get_submodule(name)(x) for name in ranks]
    assert [kernel for kernel, _ in seen] == ["shrink_kernel", *["fused_kernel"] * 3]
    assert seen[0][1]["ALIGNED"]
    one, ids = torch.ones(1, device=DEVICE), torch.tensor([0, -1], device=DEVICE)
    for y, projection in zip(found, projections, strict=True):
        torch.testing.assert_close(y, multi_lora_linear(x, *projection, one, ids), rtol=1e-2, atol=1e-2)


def from_odd_memory(tensor):
    """The same values in a storage that begins two bytes after a multiple of 16."""
    room = bytearray(tensor.nbytes + 32)
    start = torch.frombuffer(room, dtype=torch.uint8).data_ptr()
    found = torch.frombuffer(room, dtype=tensor.dtype, offset=-start % 16 + 2, count=tensor.numel()).view(tensor.shape)
    return found.copy_(tensor)


def from_odd_element(tensor):
    """The same values one element further in their storage."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@interpreted
@pytest.mark.parametrize("move", [from_odd_memory, from_odd_element])
@pytest.mark.parametrize("position", [0, 1, 4], ids=["x", "weight", "lora_B"])
def test_tensors_that_begin_between_16_bytes_take_pointers(monkeypatch, move, position):
    given = make(CASES["one_token"], torch.float16, torch.float16)
    moved = [*given]
    moved[position] = move(given[position])
    assert moved[position].data_ptr() % 16 == 2
    recorded = []

    def note(kernel):
        recorded.append(kernel)
        return kernel

    monkeypatch.setattr(replay, "_tapes", {})
    monkeypatch.setattr(launch, "wrap_triton", note)
    for arguments in (given, moved, given, moved):  # the last two are replayed
        y = ours("fused")(*arguments)
        torch.testing.assert_close(y, multi_lora_linear(*arguments), rtol=1e-2, atol=1e-2)
    assert recorded.count(launch.fused_kernel) == 1
    assert recorded.count(launch.linear_kernel) == 1


@pytest.mark.parametrize("move", [from_odd_memory, from_odd_element])
def test_hints_of_alignment_are_about_addresses(move):
    factor = torch.zeros(2, 16, 32, dtype=torch.float16)
    assert launch._aligned(factor, factor)
    assert not launch._aligned(factor, move(factor))


def test_the_number_of_programs_changes_no_bit(programs):
    arguments, found = make(CASES["several_groups"]), []
    upstream = upstream_of(arguments)
    for number in (1, 5, 1000):
        programs(number)
        found.append(results(ours("fused"), arguments, upstream))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_a_sample_by_itself_equals_it_in_a_mixed_batch():
    arguments = make(CASES["tails"])
    upstream = upstream_of(arguments)
    batch = results(ours("fused"), arguments, upstream, "x")
    for b in range(len(arguments[0])):
        alone = [arguments[0][b : b + 1], *arguments[1:6], arguments[6][b : b + 1]]
        assert_same(
            results(ours("fused"), alone, upstream[b : b + 1], "x"), {name: t[b : b + 1] for name, t in batch.items()}
        )


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_base_rows_are_the_base_layer_beside_poisoned_adapters(poison):
    arguments = make(CASES["tails"])
    upstream, base = upstream_of(arguments), arguments[6] < 0
    without = results(ours("fused"), [*arguments[:6], torch.full_like(arguments[6], -1)], upstream)
    for factor in arguments[3:6]:
        factor.fill_(poison)
    found = results(ours("fused"), arguments, upstream)
    for name in ("y", "x"):
        assert torch.equal(found[name][base], without[name][base])
        assert not torch.isfinite(found[name][~base]).any()


def test_neighbours_in_the_ranks_rows_do_not_leak():
    """q, k and v share rows of ranks: NaN of one layer must not meet the zeros past the ranks of another."""
    x, weight, bias, a, b, scale, ids = make(Case(20, 48, 80, 2, 80, [1, -1, 0]), torch.float16)  # 64 ranks a step
    poisoned = torch.full_like(a, torch.nan)
    layers = [(weight, bias, a, b), (weight, None, poisoned, b), (weight, bias, a, b)]
    first, second, third = multi_lora_linears(x, layers, scale, ids, "fused")
    expected = multi_lora_linear(x, weight, bias, a, b, scale, ids)
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-2)
    assert torch.equal(first, third)
    assert torch.isnan(second[ids >= 0]).all()
