"""Layers that read one tensor (q, k and v) are computed together by the bank, with the results of one by one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from clora.bank import routing
from clora.bank.bank import AdapterBank
from clora.lora.state import LoRAModule, LoRAState
from clora.ops import multi_lora_linear, multi_lora_linears

WIDTH = 6
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x, context=None):
        context = x if context is None else context
        return self.to_out(F.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context)))


class Block(nn.Module):
    """Attention, then a gated feed-forward step."""

    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.w1, self.w3, self.w2 = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x, context=None):
        x = x + self.attn(F.layer_norm(x, (WIDTH,)), context)
        h = F.layer_norm(x, (WIDTH,))
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.checkpointed = False

    def forward(self, x, context=None):
        for block in self.blocks:
            x = checkpoint(block, x, context, use_reentrant=False) if self.checkpointed else block(x, context)
        return x


ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out")
LAYERS = (*ATTENTION, "w1", "w3", "w2")


def lora(model, names, seed):
    """Random factors for these layers of both blocks, every rank another."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path in (f"blocks.{i}.{name}" for i in range(2) for name in names):
        n, k = model.get_submodule(path).weight.shape
        rank = 1 + len(modules) % 4
        modules[path] = LoRAModule(*(torch.randn(*shape, generator=generator) / 2 for shape in ((rank, k), (n, rank))))
    return LoRAState(modules)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 5, WIDTH, generator=generator), torch.tensor([0, -1, 1, 0])


@pytest.fixture
def calls(monkeypatch):
    """The number of layers of every call of the op from now on."""
    seen = []

    def counted(x, projections, *rest, **options):
        seen.append(len(projections))
        return multi_lora_linears(x, projections, *rest, **options)

    monkeypatch.setattr(routing, "multi_lora_linears", counted)
    return seen


def states(model, *layers):
    return {f"lora_{i}": lora(model, names, i) for i, names in enumerate(layers)}


def run(bank, slots, ids, x, context=None):
    with bank.route(slots, ids):
        return bank.transformer(x, context)


def merged(model, state, factors=None):
    """Weights by parameter name, with the LoRA merged; differentiable in `factors` by module where given."""
    weights = dict(model.named_parameters())
    for path, module in state.modules.items():
        a, b = (module.lora_A, module.lora_B) if factors is None else factors[path]
        weights[f"{path}.weight"] = weights[f"{path}.weight"] + b @ a
    return weights


def test_each_layer_is_computed_once_and_groups_together(model, inputs, calls):
    bank = AdapterBank(model, states(model, LAYERS, LAYERS))
    x, ids = inputs
    with bank.route(bank.slots(), ids):
        model(x)
        assert calls == [3, 1, 2, 1] * 2
        assert not bank.running.waiting


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        # Rows of LoRAs of other layers are calls of their own: of the first, of the second, of the first again.
        ((("attn.to_q", "attn.to_v"), ("attn.to_q",)), [2, 1, 2]),
        ((("attn.to_q",), ("attn.to_k", "w3")), [1, 1, 1, 1]),
        ((("attn.to_out", "w2"),), [1, 1]),
    ],
)
def test_groups_are_of_the_layers_that_carry_adapters(model, inputs, calls, layers, groups):
    given = states(model, *layers)
    x, ids = inputs[0], torch.tensor([0, -1, len(layers) - 1, 0])
    expected = [
        functional_call(model, merged(model, LoRAState({}) if e < 0 else given[f"lora_{e}"]), (x[i : i + 1],))
        for i, e in enumerate(ids.tolist())
    ]
    bank = AdapterBank(model, given)
    torch.testing.assert_close(run(bank, bank.slots(), ids, x), torch.cat(expected), **TOLERANCE)
    assert calls == groups * 2


def test_layers_that_read_another_tensor_are_computed_alone(model, inputs, calls):
    """Cross attention: k and v read the context, though q has the same size."""
    given = states(model, ATTENTION)
    (x, _), context = inputs, torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(2))
    expected = functional_call(model, merged(model, given["lora_0"]), (x, context))
    bank = AdapterBank(model, given)
    with bank.route(bank.slots(), torch.zeros(4, dtype=torch.int64)):
        torch.testing.assert_close(model(x, context), expected, **TOLERANCE)
        assert not bank.running.waiting
    assert calls == [3, 1, 1, 1] * 2


def test_an_output_is_handed_out_once_and_never_to_another_pass(model, inputs, calls):
    bank = AdapterBank(model, states(model, ("attn.to_q", "attn.to_k"), ("attn.to_q", "attn.to_k")))
    attn, (x, ids) = model.blocks[0].attn, inputs
    with bank.route(bank.slots(), ids):
        first, again = attn.to_q(x), attn.to_q(x)  # k waits both times
        assert torch.equal(first, again)
        assert first is not again
        assert calls == [2, 2]
        key = attn.to_k(x)
    with bank.route(bank.slots(), -torch.ones_like(ids)):
        base = attn.to_k(x)
    assert not torch.allclose(base[0], key[0], **TOLERANCE)
    # A base row, but among others: with other BLAS libraries the product's last digit differs.
    torch.testing.assert_close(base[1], key[1], **TOLERANCE)


def test_nothing_is_kept_after_the_pass(model, inputs):
    bank = AdapterBank(model, states(model, ATTENTION))
    x, ids = inputs[0].clone(), torch.zeros(4, dtype=torch.int64)
    kept = weakref.ref(x)
    with torch.no_grad(), bank.route(bank.slots(), ids):
        model.blocks[0].attn.to_q(x)
        waiting = [weakref.ref(y) for _, y in bank.running.waiting.values()]
    del x
    gc.collect()
    assert kept() is None
    assert [reference() for reference in waiting] == [None, None]


def test_rows_without_tokens(model, inputs):
    """A layer of one vector per sample, as for the time step."""
    bank = AdapterBank(model, states(model, ATTENTION, ATTENTION))
    (x, ids), attn = inputs, model.blocks[0].attn
    with bank.route(bank.slots(), ids):
        vectors = [layer(x[:, 0]) for layer in (attn.to_q, attn.to_k)]
        tokens = [layer(x[:, :1])[:, 0] for layer in (attn.to_q, attn.to_k)]
    for vector, token in zip(vectors, tokens, strict=True):
        torch.testing.assert_close(vector, token, **TOLERANCE)


def gradients(bank, slots, x, checkpointed=False, twice=False):
    """Of x and of every factor; backward runs while the pass is open, as recomputation needs it."""
    bank.transformer.checkpointed = checkpointed
    x = x.clone().requires_grad_()
    leaves = [x, *slots.parameters()]
    with bank.route(slots, torch.zeros(len(x), dtype=torch.int64)):
        loss = bank.transformer(x).square().sum()
        found = torch.autograd.grad(loss, leaves, retain_graph=twice)
        return torch.autograd.grad(loss, leaves) if twice else found


def test_gradients_where_only_some_of_a_group_are_trained(model, inputs):
    """The trained LoRA has q and v of q, k and v; only another has k, which stays out of it."""
    given = states(model, ("attn.to_q", "attn.to_v", "w3"), LAYERS)
    own, x = given["lora_0"], inputs[0]
    factors = {
        path: (m.lora_A.clone().requires_grad_(), m.lora_B.clone().requires_grad_()) for path, m in own.modules.items()
    }
    leaf = x.clone().requires_grad_()
    loss = functional_call(model, merged(model, own, factors), (leaf,)).square().sum()
    wanted = [leaf, *(factor for pair in factors.values() for factor in pair)]
    expected = dict(
        zip(["x", *((p, i) for p in factors for i in (0, 1))], torch.autograd.grad(loss, wanted), strict=True)
    )
    bank = AdapterBank(model, given)
    slots = bank.slots(["lora_0"], trainable=True)
    dx, *found = gradients(bank, slots, x)
    torch.testing.assert_close(dx, expected["x"], **TOLERANCE)
    for i, path in enumerate(slots.stacks[0].factors):
        da, db = found[2 * i][0], found[2 * i + 1][0]
        rank = own.modules[path].rank
        torch.testing.assert_close(da[:rank], expected[path, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(db[:, :rank], expected[path, 1], rtol=1e-4, atol=1e-5)


def test_output_and_gradients_of_loras_of_other_layers_and_ranks(model, inputs):
    """Three stacks in one batch, its rows unsorted; rows of the base stand in each of them."""
    given = states(model, LAYERS, ("attn.to_q", "attn.to_v", "w3"))
    given["high"] = LoRAState({m: lora.padded(20) for m, lora in lora(model, LAYERS, 7).modules.items()})
    x, ids = torch.cat([inputs[0]] * 2), [-1, 2, -1, 0, 1, -1, 0, 2]
    factors = {
        name: {m: (own.lora_A.clone().requires_grad_(), own.lora_B.clone().requires_grad_()) for m, own in state.modules.items()}
        for name, state in given.items()
    }  # fmt: skip
    rows = []
    for row, e in zip(x, ids, strict=True):
        name = list(given)[e]
        weights = dict(model.named_parameters()) if e < 0 else merged(model, given[name], factors[name])
        rows.append(functional_call(model, weights, (row[None],)))
    expected = torch.cat(rows)
    leaves = [factor for own in factors.values() for pair in own.values() for factor in pair]
    expected_gradients = torch.autograd.grad(expected.square().sum(), leaves)
    bank = AdapterBank(model, given)
    slots = bank.slots(trainable=True)
    assert len(slots.stacks) == 3
    found = run(bank, slots, ids, x)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    found_gradients = torch.autograd.grad(found.square().sum(), slots.parameters())
    exact = dict(zip(map(id, leaves), expected_gradients, strict=True))
    at = dict(zip(map(id, slots.parameters()), found_gradients, strict=True))
    for slot, name in enumerate(given):
        stack, row = slots.places[slot]
        for module, pair in slots.stacks[stack].factors.items():
            for factor, own in zip(pair, factors[name][module], strict=True):
                gradient = at[id(factor)][row][tuple(slice(size) for size in own.shape)]
                torch.testing.assert_close(gradient, exact[id(own)], rtol=1e-4, atol=1e-5)


def test_nothing_of_a_stack_reaches_rows_of_another(model, inputs):
    given = states(model, LAYERS, ("attn.to_q", "w2"))
    x, ids = inputs
    bank = AdapterBank(model, given)
    expected = run(bank, bank.slots(), ids, x)
    for factor in bank.slots(["lora_0"]).parameters():
        factor.fill_(torch.nan)
    found = run(bank, bank.slots(), ids, x)
    others = ids != 0
    assert found[~others].isnan().all()
    assert torch.equal(found[others], expected[others])


def test_a_batch_that_a_layer_sees_twice_is_routed_twice(model, inputs):
    """One vector per sample, as a modulation that is also computed for timestep 0; two stacks."""
    bank = AdapterBank(model, states(model, LAYERS, ("attn.to_q",)))
    (x, ids), layer = inputs, model.blocks[0].attn.to_q
    with bank.route(bank.slots(), ids):
        once, twice = layer(x[:, 0]), layer(torch.cat([x[:, 0], x[:, 1]]))
        second = layer(x[:, 1])
    torch.testing.assert_close(twice, torch.cat([once, second]), **TOLERANCE)


@pytest.mark.parametrize("twice", [False, True])
def test_recomputed_activations_give_the_same_gradients(model, inputs, twice):
    bank = AdapterBank(model, states(model, LAYERS, ATTENTION))
    slots = bank.slots(["lora_0"], trainable=True)
    expected = gradients(bank, slots, inputs[0])
    for found, exact in zip(gradients(bank, slots, inputs[0], checkpointed=True, twice=twice), expected, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("other", [LAYERS, ("attn.to_q", "w2")], ids=["one stack", "two stacks"])
def test_torch_compile_has_no_graph_break(model, inputs, other):
    bank = AdapterBank(model, states(model, LAYERS, other))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, ids = inputs
    for given in (ids, ids.flip(0)):
        expected = run(bank, bank.slots(), given, x)
        with bank.route(bank.slots(), given):
            torch.testing.assert_close(compiled(x), expected, **TOLERANCE)
            assert not bank.running.waiting
    torch._dynamo.reset()


def test_the_op_equals_its_layers_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, scale, ids = rand(3, 4, 6), rand(2), torch.tensor([1, -1, 0])
    projections = [(rand(n, 6), rand(n) if n % 2 else None, rand(2, r, 6), rand(2, n, r)) for n, r in ((5, 2), (4, 3))]
    together = multi_lora_linears(x, projections, scale, ids)
    assert len(together) == 2
    for y, projection in zip(together, projections, strict=True):
        assert torch.equal(y, multi_lora_linear(x, *projection, scale, ids))
