"""Two teachers, pictures and a config that distils them."""

from __future__ import annotations

import pytest
from helpers.pictures import write_images

from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.lora.families import FLUX2
from clora.lora.save import save_lora
from clora.testing import random_lora, tiny_config

EFFECTS = ("blueprint", "snow")


@pytest.fixture(scope="session")
def loras(adapter, tmp_path_factory):
    """Two teachers in different formats and of different ranks."""
    folder, transformer = tmp_path_factory.mktemp("loras"), adapter.pipeline.transformer
    save_lora(random_lora(transformer, 3, 1), folder / "blueprint.safetensors", "kohya", alpha=2.0, family=FLUX2)
    save_lora(random_lora(transformer, 2, 2, ["transformer_blocks.0.attn.to_q"]), folder / "snow", "peft", alpha=1.0)
    return {"blueprint": folder / "blueprint.safetensors", "snow": folder / "snow"}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 4)


@pytest.fixture
def make_config(tiny_folder, loras, images, tmp_path):
    def make(first=(), **sections):
        effects = [{"name": e, "lora": str(loras[e]), "prompt": f"make it {e}"} for e in EFFECTS]
        effects[0].update(first)
        data = {"sources": str(images), "sources_per_effect": 2, "held_out": 1, **sections.pop("data", {})}
        defaults = {"pipeline": str(tiny_folder), "output": str(tmp_path / "out"), "data": data}
        return tiny_config(effects, **{**defaults, **sections})

    return make


@pytest.fixture
def finished(make_config, monkeypatch):
    """A config whose collection is finished, and the list of the configs that are trained from then on."""
    config, trained, train = make_config(), [], engine.train_student
    distill(config)
    monkeypatch.setattr(engine, "train_student", lambda config, *rest: trained.append(config) or train(config, *rest))
    return config, trained
