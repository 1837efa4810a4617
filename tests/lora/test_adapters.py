"""LoKr, LoHa, full differences and DoRA: the update is the type's own formula, exact or within the stated error."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS, Random, assert_changes, product, write
from helpers.versions import since_diffusers
from hypothesis import given, settings
from hypothesis import strategies as st

from clora.errors import CloraError
from clora.lora.algebra import MAX_RANK
from clora.lora.inspect import inspect
from clora.lora.layers import linear_shapes, linear_weights
from clora.lora.load import read_lora

SPELLINGS = ["lycoris_{}", "lora_unet_{}", "diffusion_model.{}", "transformer.{}", "{}"]


def spelled(spelling, module):
    return spelling.format(module.replace(".", "_") if spelling.endswith("_{}") else module)


def divisors(number):
    return [d for d in range(1, number + 1) if number % d == 0]


def random_lokr(random, stem, shape, first, second, alpha):
    """A LoKr whose factors are whole or products; returns its tensors and its update by the definition."""
    rows, columns = (random.integer(0, 10**6) % len(divisors(size)) for size in shape)
    small = divisors(shape[0])[rows], divisors(shape[1])[columns]
    large = shape[0] // small[0], shape[1] // small[1]
    tensors, factors, rank = {}, [], None
    for name, size, is_product in (("w1", small, first), ("w2", large, second)):
        if is_product:
            rank = rank or random.integer(1, 3)
            up, down = random.matrix(size[0], rank), random.matrix(rank, size[1])
            tensors |= {f"{stem}.lokr_{name}_a": up, f"{stem}.lokr_{name}_b": down}
            factors.append(up.double() @ down.double())
        else:
            tensors[f"{stem}.lokr_{name}"] = whole = random.matrix(*size)
            factors.append(whole.double())
    scale = 1.0
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        scale = alpha / rank if rank else 1.0  # of whole factors alpha is ignored
    # Row (a, b) and column (c, d) of the update: W1[a, c] W2[b, d].
    delta = scale * torch.einsum("ac,bd->abcd", *factors).reshape(shape)
    return tensors, delta


def random_loha(random, stem, shape, alpha):
    rank = random.integer(1, 3)
    pairs = [(random.matrix(shape[0], rank), random.matrix(rank, shape[1])) for _ in range(2)]
    tensors = {f"{stem}.hada_w{i + 1}_{x}": pairs[i][k] for i in range(2) for k, x in enumerate("ab")}
    scale = 1.0
    if alpha is not None:
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        scale = alpha / rank
    delta = scale * (pairs[0][0].double() @ pairs[0][1].double()) * (pairs[1][0].double() @ pairs[1][1].double())
    return tensors, delta


@pytest.fixture(scope="module")
def models():
    made = {}
    for name, build in TRANSFORMERS.items():
        torch.manual_seed(0)
        made[name] = build().eval()
    return made


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("alpha", [None, 2.5])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1)], ids=str)
def test_lokr(tmp_path, models, family, alpha, first, second):
    shapes, random, tensors, expected = linear_shapes(models[family]), Random(0), {}, {}
    for index, module in enumerate(list(shapes)[:8]):
        stem = spelled(SPELLINGS[index % len(SPELLINGS)], module)
        made, expected[module] = random_lokr(random, stem, shapes[module], first, second, alpha)
        tensors |= made
    state = read_lora(write(tmp_path / "a.safetensors", tensors), shapes)
    assert_changes(state, expected)
    assert not state.errors


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("alpha", [None, 2.5])
def test_loha(tmp_path, models, family, alpha):
    shapes, random, tensors, expected = linear_shapes(models[family]), Random(1), {}, {}
    for index, module in enumerate(list(shapes)[:8]):
        stem = spelled(SPELLINGS[index % len(SPELLINGS)], module)
        made, expected[module] = random_loha(random, stem, shapes[module], alpha)
        tensors |= made
    state = read_lora(write(tmp_path / "a.safetensors", tensors), shapes)
    assert_changes(state, expected)
    assert not state.errors


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["loha", (0, 0), (0, 1), (1, 0), (1, 1)]),
    alpha=st.sampled_from([None, 0.5, 3.0, 7.0]),
)
def test_odd_shapes(tmp_path_factory, shape, seed, kind, alpha):
    random = Random(seed)
    make = (lambda: random_loha(random, "x", shape, alpha)) if kind == "loha" else None
    tensors, delta = make() if make else random_lokr(random, "x", shape, *kind, alpha)
    path = write(tmp_path_factory.mktemp("odd") / "a.safetensors", tensors)
    assert_changes(read_lora(path, {"x": shape}), {"x": delta})


def test_alpha_of_a_lokr_of_two_products(tmp_path):
    """Divided by the second product's rank, as LyCORIS and ComfyUI do."""
    random = Random(12)
    first, second = (random.matrix(4, 3), random.matrix(3, 5)), (random.matrix(6, 2), random.matrix(2, 7))
    tensors = {f"x.lokr_w{i + 1}_{x}": (first, second)[i][k] for i in range(2) for k, x in enumerate("ab")}
    path = write(tmp_path / "a.safetensors", tensors | {"x.alpha": torch.tensor(5.0)})
    delta = torch.einsum("ac,bd->abcd", *(up.double() @ down.double() for up, down in (first, second)))
    assert_changes(read_lora(path, {"x": (24, 35)}), {"x": 5 / 2 * delta.reshape(24, 35)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_alpha_of_whole_lokr_factors_is_not_read(tmp_path, dtype):
    """ai-toolkit writes 1e10 there, which is infinite in 16 bits."""
    first, second = Random(2).matrix(2, 3).to(dtype), Random(3).matrix(4, 5).to(dtype)
    tensors = {"x.lokr_w1": first, "x.lokr_w2": second, "x.alpha": torch.tensor(float("inf"), dtype=torch.float16)}
    state = read_lora(write(tmp_path / "a.safetensors", tensors), {"x": (8, 15)})
    assert_changes(state, {"x": torch.kron(first.double(), second.double())})


@pytest.mark.parametrize("family", ["FLUX.1", "FLUX.2", "Z-Image"])
@pytest.mark.parametrize("kind", ["lokr_low", "lokr_whole", "loha", "diff"])
def test_fused(tmp_path, models, family, kind):
    """A block of rows of a fused module, where those of a Kronecker product are none of its factors' blocks."""
    shapes = linear_shapes(models[family])
    stem, parts = {
        "FLUX.1": ("single_blocks.0.linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]),
        "FLUX.2": ("double_blocks.0.txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
        "Z-Image": ("layers.0.attention.qkv", ["attention.to_q", "attention.to_k", "attention.to_v"]),
    }[family]
    block = {"FLUX.1": "single_transformer_blocks.0", "FLUX.2": "transformer_blocks.0", "Z-Image": "layers.0"}[family]
    modules = [f"{block}.{part}" for part in parts]
    rows, columns = sum(shapes[module][0] for module in modules), shapes[modules[0]][1]
    random, name = Random(3), f"diffusion_model.{stem}"
    if kind == "loha":
        tensors, delta = random_loha(random, name, (rows, columns), 2.0)
    elif kind == "diff":
        tensors = {f"{name}.diff": random.matrix(rows, columns)}
        delta = tensors[f"{name}.diff"].double()
    else:
        first = random.matrix(4, 2)
        second = random.matrix(rows // 4, 2), random.matrix(2, columns // 2)
        tensors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second[0] @ second[1]}
        if kind == "lokr_low":
            tensors = {f"{name}.lokr_w1": first, f"{name}.lokr_w2_a": second[0], f"{name}.lokr_w2_b": second[1]}
        delta = torch.kron(first.double(), second[0].double() @ second[1].double())
    blocks = delta.split([shapes[module][0] for module in modules])
    state = read_lora(write(tmp_path / "a.safetensors", tensors), shapes)
    assert_changes(state, dict(zip(modules, blocks, strict=True)))


@pytest.fixture
def at_most(monkeypatch):
    """Returns at_most(rank): the most ranks of factors, a few instead of the kernels' 256."""
    return lambda rank: monkeypatch.setattr("clora.lora.load.MAX_RANK", rank)


def test_dense_changes_become_factors_within_the_error(tmp_path, at_most):
    """With fewer ranks than the change has: the lowest rank within the error, the error as it is."""
    at_most(20)
    random = Random(4)
    left, _ = torch.linalg.qr(random.matrix(40, 30).double())
    right, _ = torch.linalg.qr(random.matrix(50, 30).double())
    values = 0.5 ** torch.arange(30).double()
    delta = ((left * values) @ right.T).float()
    path = write(tmp_path / "a.safetensors", {"x.diff": delta})
    for max_error in (0.2, 0.01, 1e-4):
        module = (state := read_lora(path, {"x": (40, 50)}, max_error=max_error)).modules["x"]
        rest = (values.square().flip(0).cumsum(0).flip(0) / values.square().sum()).sqrt()
        lowest = int((rest > max_error).sum())
        assert module.rank == lowest
        found = module.lora_B.double() @ module.lora_A.double()
        measured = ((found - delta.double()).norm() / delta.double().norm()).item()
        assert state.errors["x"] == pytest.approx(measured, rel=1e-3)
        assert state.errors["x"] == pytest.approx(rest[lowest].item(), rel=1e-3)
        assert state.padded(30).errors == state.errors


def test_too_large_an_error_is_refused(tmp_path, at_most):
    """A random matrix is the hardest case: the error is that of the best 20 ranks to within 1 %."""
    at_most(20)
    delta = Random(5).matrix(90, 120)
    path = write(tmp_path / "a.safetensors", {"x.diff": delta})
    values = torch.linalg.svdvals(delta.double()).square()
    best = (values[20:].sum() / values.sum()).sqrt().item()
    with pytest.raises(CloraError, match=r"x is a diff .* at rank 20 an error of \d\d\.\d\d% is left, 1\.00% is"):
        read_lora(path, {"x": (90, 120)})
    state = read_lora(path, {"x": (90, 120)}, max_error=0.99 * best + 0.02)
    torch.manual_seed(7)  # another state of the global generator
    again = read_lora(path, {"x": (90, 120)}, max_error=0.99 * best + 0.02)
    assert torch.equal(state.modules["x"].lora_A, again.modules["x"].lora_A)
    module = read_lora(path, {"x": (90, 120)}, max_error=0.99).modules["x"]
    assert module.rank < 20
    highest = read_lora(path, {"x": (90, 120)}, max_error=1.01 * best)
    assert highest.modules["x"].rank == 20
    assert best <= highest.errors["x"] <= 1.01 * best


def test_a_change_of_nothing(tmp_path, at_most):
    at_most(3)
    path = write(tmp_path / "a.safetensors", {"x.diff": torch.zeros(40, 50)})
    state = read_lora(path, {"x": (40, 50)})
    assert state.modules["x"].rank == 1
    assert not state.modules["x"].delta().any()


def test_the_rank_limit_is_that_of_the_kernels():
    checks = pytest.importorskip(
        "csrc_triton.multi_lora.checks", reason="the kernels need Triton", exc_type=ImportError
    )
    assert MAX_RANK == checks.MAX_RANK


def test_the_callers_random_numbers_are_left_alone(tmp_path, at_most):
    at_most(3)
    path = write(tmp_path / "a.safetensors", {"x.diff": torch.ones(40, 50)})
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    read_lora(path, {"x": (40, 50)})
    assert torch.equal(torch.rand(4), expected)


def dora(base, delta, magnitude, dim):
    merged = base.double() + delta
    return (
        magnitude.double().reshape(-1, 1) * merged / merged.norm(dim=1, keepdim=True) - base.double()
        if dim
        else (magnitude.double().reshape(1, -1) * merged / merged.norm(dim=0, keepdim=True) - base.double())
    )


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("dim", [1, 0], ids=["rows", "columns"])
@pytest.mark.parametrize("kind", ["lora", "lokr", "loha"])
def test_dora(tmp_path, models, family, dim, kind):
    model = models[family]
    shapes, random, tensors, expected = linear_shapes(model), Random(6), {}, {}
    for module in list(shapes)[3:9]:
        stem, shape = f"lora_unet_{module.replace('.', '_')}", shapes[module]
        base = model.get_submodule(module).weight.detach()
        if kind == "lokr":
            made, delta = random_lokr(random, stem, shape, 0, 1, 2.0)
        elif kind == "loha":
            made, delta = random_loha(random, stem, shape, 2.0)
        else:
            lora_A, lora_B = random.pair(shape, 3)
            made = {f"{stem}.lora_down.weight": lora_A, f"{stem}.lora_up.weight": lora_B}
            made[f"{stem}.alpha"] = torch.tensor(1.5)
            delta = product(lora_A, lora_B, 0.5)
        magnitude = base.norm(dim=dim, keepdim=True) * (1 + random.matrix(1).abs())
        tensors |= made | {f"{stem}.dora_scale": magnitude}
        expected[module] = dora(base, delta, magnitude, dim)
    path = write(tmp_path / "a.safetensors", tensors)
    assert_changes(read_lora(path, shapes, linear_weights(model), max_error=1e-5), expected, 1.1e-5)
    with pytest.raises(CloraError, match="DoRA, whose update depends on the weights of the base"):
        read_lora(path, shapes)


@pytest.mark.parametrize(
    ("family", "stem", "modules", "swap"),
    [
        ("FLUX.1", "single_blocks.1.linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], False),
        ("FLUX.2", "final_layer.adaLN_modulation.1", ["norm_out.linear"], True),
    ],
    ids=["fused", "swapped"],
)
def test_dora_of_original_modules(tmp_path, models, family, stem, modules, swap):
    """The columns' lengths run over all rows of the original module, in its order."""
    model = models[family]
    names = modules if swap else [f"single_transformer_blocks.1.{module}" for module in modules]
    weights = [model.get_submodule(name).weight.detach() for name in names]
    base = torch.cat(weights)
    base = torch.cat(base.chunk(2)[::-1]) if swap else base
    random = Random(7)
    lora_A, lora_B = random.pair(base.shape, 3)
    tensors = {f"diffusion_model.{stem}.lora_A.weight": lora_A, f"diffusion_model.{stem}.lora_B.weight": lora_B}
    magnitude = base.norm(dim=0, keepdim=True) * 1.3
    delta = dora(base, product(lora_A, lora_B), magnitude, 0)
    delta = torch.cat(delta.chunk(2)[::-1]) if swap else delta
    path = write(tmp_path / "a.safetensors", tensors | {f"diffusion_model.{stem}.dora_scale": magnitude})
    state = read_lora(path, linear_shapes(model), linear_weights(model), max_error=1e-5)
    expected = dict(zip(names, delta.split([len(weight) for weight in weights]), strict=True))
    assert_changes(state, expected, tolerance=1.1e-5)


def test_dora_refuses_a_base_that_it_cannot_read(tmp_path):
    tensors = {"x.lora_A.weight": torch.ones(2, 6), "x.lora_B.weight": torch.ones(4, 2)}
    path = write(tmp_path / "a.safetensors", tensors | {"x.dora_scale": torch.ones(4, 1)})
    packed, codes = torch.zeros(12, 1, dtype=torch.uint8), torch.zeros(4, 6, dtype=torch.int8)
    for base in (packed, codes, torch.zeros(4, 6, device="meta")):
        with pytest.raises(CloraError, match="not quantised"):
            read_lora(path, {"x": (4, 6)}, {"x": base})


PEFT_CONFIGS = {
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "lokr_both": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_both": True}),
    "lokr_whole": ("LoKrConfig", {"r": 64, "alpha": 48}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}),
}


@pytest.mark.parametrize("family", TRANSFORMERS)
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_peft_folder(tmp_path, models, family, kind):
    """As PEFT writes it, and as PEFT merges it; PEFT also scales whole LoKr factors, by the rank of its config."""
    import peft

    model = models[family]
    shapes, random = linear_shapes(model), Random(8)
    modules = list(shapes)[2:8]
    name, options = PEFT_CONFIGS[kind]
    pattern = {} if kind == "dora" else {"alpha_pattern": {modules[0]: 7}}
    wrapped = peft.get_peft_model(
        copy.deepcopy(model), getattr(peft, name)(target_modules=modules, **options, **pattern)
    )
    for key, parameter in wrapped.named_parameters():
        if "magnitude" in key:
            parameter.data = parameter.data * 1.2
        elif any(word in key for word in ("lora_", "lokr_", "hada_")):
            parameter.data = random.matrix(*parameter.shape)
    wrapped.save_pretrained(tmp_path)
    merged = wrapped.double().merge_and_unload()
    expected = {
        module: merged.get_submodule(module).weight.detach() - model.get_submodule(module).weight.detach().double()
        for module in modules
    }
    state = read_lora(tmp_path, shapes, linear_weights(model), max_error=1e-5)
    assert state.format == "peft"
    assert_changes(state, expected, tolerance=1.1e-5)


def test_peft_dora_without_magnitudes_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "use_dora": True}))
    tensors = {
        "base_model.model.x.lora_A.weight": torch.ones(2, 6),
        "base_model.model.x.lora_B.weight": torch.ones(4, 2),
    }
    write(tmp_path / "adapter_model.safetensors", tensors)
    with pytest.raises(CloraError, match="states DoRA but .* has no magnitude"):
        read_lora(tmp_path, {"x": (4, 6)})
    assert "has no magnitude" in inspect(tmp_path)["problems"][0]


@since_diffusers("0.42", "the first that reads LoKr")
def test_diffusers_agrees_on_lokr(tmp_path, models):
    """It fuses q, k and v of the model first, since it does not cut a Kronecker product."""
    from diffusers import Flux2Pipeline

    model = models["FLUX.2"]
    shapes, random, tensors = linear_shapes(model), Random(9), {}
    for module in ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_q"):
        stem = f"lycoris_{module.replace('.', '_')}"
        # PEFT itself chooses the factors' shapes: 24 is 4 * 6.
        tensors |= {f"{stem}.lokr_w1": random.matrix(4, 4), f"{stem}.alpha": torch.tensor(3.0)}
        tensors |= {f"{stem}.lokr_w2_a": random.matrix(6, 2), f"{stem}.lokr_w2_b": random.matrix(2, 6)}
    path = write(tmp_path / "a.safetensors", tensors)
    loaded = copy.deepcopy(model)
    pipe = Flux2Pipeline(transformer=loaded, scheduler=None, vae=None, text_encoder=None, tokenizer=None)
    pipe.load_lora_weights(path)
    loaded.fuse_lora()
    loaded.unload_lora()
    state = read_lora(path, shapes)
    assert len(state.modules) == 2
    for name, module in state.modules.items():
        found = (loaded.get_submodule(name).weight - model.get_submodule(name).weight).detach()
        torch.testing.assert_close(found, module.delta(), rtol=1e-4, atol=1e-6)
