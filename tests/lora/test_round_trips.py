"""Every format of every family, every layer: what was written is read back as the same change."""

from __future__ import annotations

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS
from safetensors.torch import load_file

from clora.lora.convert import convert_lora
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.load import load_lora
from clora.lora.save import FORMATS, save_lora
from clora.lora.state import LoRAState
from clora.testing import random_lora


@pytest.fixture(scope="module", params=TRANSFORMERS)
def model(request):
    torch.manual_seed(0)
    return TRANSFORMERS[request.param]().eval()


@pytest.fixture(params=["blocks", "all layers"])
def state(request, model):
    """Two ranks in turn, so that fused parts have different ones."""
    names = block_layers(model) if request.param == "blocks" else list(linear_shapes(model))
    halves = random_lora(model, 2, 3, names[::2]), random_lora(model, 4, 4, names[1::2])
    return LoRAState({**halves[0].modules, **halves[1].modules})


def exported(state, model, tmp_path, format):
    """The file or folder that `clora export` writes of the state, beside its pipeline's config."""
    model.save_config(tmp_path / "base" / "transformer")
    save_lora(state, tmp_path / "in.safetensors")
    output = tmp_path / (format if format == "peft" else f"{format}.safetensors")
    convert_lora(tmp_path / "in.safetensors", output, format, pipeline=tmp_path / "base")
    return output


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_change_is_read_back(state, model, tmp_path, format, assert_same_deltas):
    read = load_lora(exported(state, model, tmp_path, format), model)
    assert read.format == format
    assert set(read.modules) == set(state.modules)
    assert_same_deltas(read, state, atol=1e-6)


def test_bare_names_are_the_transformers_own(state, model, tmp_path):
    """As LightX2V and DiffSynth look them up; no alpha is stated, since theirs would be alpha = rank too."""
    tensors = load_file(exported(state, model, tmp_path, "bare"))
    assert set(tensors) == {f"{name}.{half}.weight" for name in state.modules for half in ("lora_A", "lora_B")}


@pytest.mark.parametrize("format", ["kohya", "comfyui"])
def test_no_model_is_needed_for_a_file_that_shows_it(model, tmp_path, format, assert_same_deltas):
    """The blocks' names fit FLUX.1 and LongCat-Image, and both have the same ones in these formats."""
    state = random_lora(model, 2, 0)
    save_lora(state, tmp_path / "in.safetensors")
    convert_lora(tmp_path / "in.safetensors", tmp_path / "out.safetensors", format)
    assert_same_deltas(load_lora(tmp_path / "out.safetensors", model), state, atol=1e-6)
