"""Hostile LoRA files: whatever a file holds, only our own errors come out of reading it."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from clora.errors import CloraError
from clora.lora.inspect import check_usable, inspect, render
from clora.lora.load import lora_ranks, read_lora

LAYERS = ("transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "proj_out", "x")
PREFIXES = (
    "",
    "transformer.",
    "base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "lora_unet_",
    "lycoris_",
)
PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_down.weight", "lora_up.weight", "alpha", "diff"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "dora_scale", "diff_b"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lora_magnitude_vector.default", "bias", ""),
)
GROUPS = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.weight", "lora_B.weight", "dora_scale"),
    ("lora_down.weight", "lora_up.weight", "alpha"),
    ("lokr_w1", "lokr_w2"),
    ("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("diff",),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64, torch.int8, torch.bool)
VALUES = st.sampled_from([0.0, 1.0, -1.0, 1e-30, 240.0, 3e38, 1e30, float("nan"), float("inf")])
SIZES = st.sampled_from([0, 1, 2, 4, 16, 48, 64, 300])
# Values of JSON that a program would not write.
ODD = st.sampled_from(
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 10**5,
        "9" * 5000,
        '{"r": ' + "9" * 5000 + "}",
        '{"r": 1e999}',
        '{"r": -1}',
        '{"r": {}}',
        "\udcff",
    ]
)
CONFIGS = st.dictionaries(
    st.sampled_from(
        [
            "r",
            "lora_alpha",
            "alpha",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "peft_type",
            "init_lora_weights",
        ]
    ),
    st.one_of(
        st.sampled_from([0, 1, 4, -4, 1e308, 10**400, True, None, "LORA", "LOKR", "pissa", [], "x"]),
        st.dictionaries(
            st.sampled_from(["(a+)+$", "to_q", "^x$", ".*proj_out", "", "["]),
            st.sampled_from([0, 1, 4, "4", None, 1e30]),
        ),
    ),
).map(json.dumps)


@st.composite
def written(draw):
    """A file as safetensors writes it: names and shapes that nearly fit, odd values and metadata."""
    tensors = {}
    for layer in draw(st.lists(st.sampled_from(LAYERS), max_size=3)):
        prefix = draw(st.sampled_from(PREFIXES))
        name = prefix + (layer.replace(".", "_") if prefix.startswith("l") else layer)
        sizes = {"rank": draw(SIZES), "out": draw(SIZES), "in": draw(SIZES)}
        group = draw(st.one_of(st.sampled_from(GROUPS), st.lists(st.sampled_from(PARTS), max_size=5)))
        for part in group:
            shape = (sizes["rank"], sizes["in"])
            if part in ("lora_B.weight", "lora_up.weight") or part.endswith("_a"):
                shape = (sizes["out"], sizes["rank"])
            elif part == "alpha":
                shape = ()
            elif part == "dora_scale":
                shape = (sizes["out"], 1)
            if draw(st.integers(0, 9)) == 0:
                shape = draw(st.lists(SIZES, max_size=4).filter(lambda shape: torch.Size(shape).numel() < 10**5))
            tensors[f"{name}.{part}"] = torch.full(shape, draw(VALUES)).to(draw(st.sampled_from(DTYPES)))
    metadata = draw(
        st.dictionaries(st.sampled_from(["lora_adapter_metadata", "clora.effects", "a"]), st.one_of(CONFIGS, ODD))
    )
    return save(tensors, {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()})


@st.composite
def claimed(draw):
    """A header of claims: any type, shape and place of the data."""
    numbers = st.sampled_from([0, 1, 4, 16, 300, 2**31, 2**32, 2**63, 2**64, -1, 1.5, "4", None])
    names = st.builds(
        lambda *words: "".join(words),
        st.sampled_from(PREFIXES),
        st.sampled_from(LAYERS),
        st.just("."),
        st.sampled_from(PARTS),
    )
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "I64", "C64", "", None]),
            "shape": st.one_of(st.lists(numbers, max_size=4), numbers),
            "data_offsets": st.one_of(st.lists(numbers, min_size=2, max_size=2), st.just([0, 64])),
        }
    )
    header = json.dumps(
        draw(st.dictionaries(st.one_of(names, st.text(max_size=5), st.just("__metadata__")), entry, max_size=4))
    )
    length = draw(st.one_of(st.just(len(header)), st.sampled_from([0, 1, 2**20, 2**62, 2**64 - 1])))
    return struct.pack("<Q", length) + header.encode() + bytes(draw(st.sampled_from([0, 1, 64, 256])))


@st.composite
def damaged(draw):
    """A file of the first kind with flipped, missing or added bytes."""
    data = bytearray(draw(written()))
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, max(len(data) - 1, 0)))] ^= draw(st.integers(1, 255))
    cut = draw(st.integers(0, len(data)))
    return bytes(data[:cut] if draw(st.booleans()) else data + data[:cut])


def check(data, folder, transformer, shapes):
    """Reads a file in every way."""
    file = folder / "fuzz.safetensors"
    file.write_bytes(data)

    def describe(*model):
        info = inspect(file, *model)
        json.dumps(info)
        render(info)
        check_usable(info)

    messages = []
    for read in (
        lambda: describe(),
        lambda: describe(transformer),
        lambda: lora_ranks(file, shapes),
        lambda: read_lora(file, shapes),
    ):
        try:
            read()
        except CloraError as error:
            messages.append(str(error))
    assert all(len(message) < 10_000 for message in messages)


FILES = {"written": written(), "claimed": claimed(), "damaged": damaged()}
CASES = {"written": 500, "claimed": 250, "damaged": 250}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def fuzz(kind, cases, derandomize, *where):
    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=FILES[kind])
    def run(data):
        check(data, *where)

    run()


@pytest.mark.parametrize("kind", CASES)
def test_only_our_errors_come_out(kind, folder, transformer, shapes):
    fuzz(kind, CASES[kind], True, folder, transformer, shapes)


@pytest.mark.soak
@pytest.mark.parametrize("kind", CASES)
def test_only_our_errors_come_out_of_many_files(kind, folder, transformer, shapes):
    fuzz(kind, 10 * CASES[kind], False, folder, transformer, shapes)
