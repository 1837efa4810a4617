"""Which file for which program (docs/models.md), by the programs' own code.

``CLORA_DIFFSYNTH=folder CLORA_SGLANG=folder pytest tests/programs``, with the folders of unpacked wheels.
"""

from __future__ import annotations

import pytest
import torch
from helpers.lora_cases import TRANSFORMERS
from programs.loaders import diffsynth_names, sglang_names

from clora.lora.families import family_of
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.save import save_lora
from clora.testing import random_lora

DIFFSYNTH = {
    "FLUX.1": "diffusers",
    "FLUX.2": "bare",
    "Qwen-Image": "bare",
    "Qwen-Image-2.1": "bare",
    "Z-Image": "bare",
}


def written(tmp_path, model, format):
    """A file of all layers of the blocks."""
    path = tmp_path / (format if format == "peft" else f"{format}.safetensors")
    state = random_lora(model, 2, 0)
    save_lora(state, path, format, family=family_of(linear_shapes(model)))
    return path / "adapter_model.safetensors" if format == "peft" else path


@pytest.fixture(params=list(TRANSFORMERS))
def family(request):
    torch.manual_seed(0)
    return request.param, TRANSFORMERS[request.param]()


def test_diffsynth(family, tmp_path):
    name, model = family
    if name not in DIFFSYNTH:
        pytest.skip("DiffSynth has no such model")
    stated, taken = diffsynth_names(name, written(tmp_path, model, DIFFSYNTH[name]))
    assert stated
    assert taken == stated
    other = "bare" if DIFFSYNTH[name] == "diffusers" else "diffusers"
    assert not diffsynth_names(name, written(tmp_path, model, other))[1]


@pytest.mark.parametrize("format", ["peft", "bare"])
def test_sglang(family, tmp_path, format):
    """A LoRA's layer is looked for where the loader puts the base's weight of that layer."""
    name, model = family
    found, place = sglang_names(name, written(tmp_path, model, format))
    assert found == {place(layer) for layer in block_layers(model)}


def test_sglang_takes_the_collection_of_flux_only(family, tmp_path):
    name, model = family
    found, place = sglang_names(name, written(tmp_path, model, "diffusers"))
    wholly = found == {place(layer) for layer in block_layers(model)}
    assert wholly == (name in ("FLUX.1", "FLUX.2", "Qwen-Image-2.1"))
