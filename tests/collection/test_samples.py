"""The samples of a collection, drawn when the student is trained."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from helpers.pictures import write_images
from PIL import Image

from clora.collection import samples as drawing
from clora.collection.samples import draw_samples
from clora.collection.write import LORA_FILE, SAMPLES_FILE
from clora.commands.distill import distill
from clora.data.generation import Generator
from clora.data.images import load_images
from clora.lora.save import save_lora
from clora.models.conditioning import Conditioning
from clora.testing import SIZE, merge_lora, random_data, random_lora, tiny_config

EFFECTS = ("blueprint", "snow")


@pytest.fixture
def make_config(adapter, tiny_folder, tmp_path):
    shared, own = write_images(tmp_path / "shared", 2), write_images(tmp_path / "own", 3)
    effects = [{"name": name, "lora": str(tmp_path / name), "prompt": f"make it {name}"} for name in EFFECTS]
    effects[1]["sources"] = str(own)
    for seed, name in enumerate(EFFECTS):
        save_lora(random_lora(adapter.pipeline.transformer, 2, seed), tmp_path / name, "peft", alpha=1.0)

    def make(**sections):
        base = {"pipeline": str(tiny_folder), "output": str(tmp_path / "out")}
        return tiny_config(effects, **base, data={"sources": str(shared), "sources_per_effect": 1}, **sections)

    return make


def as_pixels(images):
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("forward_rows", [None, 1])
def test_each_effect_beside_its_target(adapter, make_config, monkeypatch, forward_rows):
    drawn = []
    monkeypatch.setattr(drawing, "draw_grid", lambda *grid: drawn.append(grid) or np.zeros((4, 4, 3), np.uint8))
    config = make_config(train={"forward_rows": forward_rows})
    data, student = random_data(adapter, list(EFFECTS)), random_lora(adapter.pipeline.transformer, 3, 7)
    draw_samples(config, adapter, student, data, torch.device("cpu"))
    ((columns, rows, pixels),) = drawn
    assert (columns[2], rows) == (f"this LoRA, {config.sampler.steps} passes", EFFECTS)
    firsts = [load_images(folder, SIZE)[0] for folder in (config.data.sources, config.effects[1].sources)]
    np.testing.assert_array_equal(pixels[:, 0], as_pixels(torch.stack(firsts)))
    np.testing.assert_array_equal(pixels[:, 1], as_pixels(adapter.decode(data.targets[:, 0])))

    merged = copy.copy(adapter)
    merged.pipeline = copy.copy(adapter.pipeline)
    merged.pipeline.transformer = merge_lora(adapter.pipeline.transformer, student)
    generator = Generator(merged)
    conditioning = Conditioning(data.text[data.student_text[:, 0, 0]], data.sources[:, 0])
    latents = generator.few_step(
        torch.arange(2), conditioning, [config.seed] * 2, config.sampler.steps, config.sampler.shift
    )
    expected = as_pixels(adapter.decode(latents)).astype(int)
    assert np.abs(pixels[:, 2].astype(int) - expected).max() <= 1


def test_large_pictures_are_drawn_small():
    assert drawing._small(torch.zeros(3, 512, 1024)).shape == (128, 256, 3)
    assert drawing._small(torch.zeros(3, 64, 32)).shape == (64, 32, 3)


def test_the_card_shows_samples_if_there_are_any(make_config, monkeypatch, capsys):
    folder = distill(make_config())
    image = Image.open(io.BytesIO((folder / SAMPLES_FILE).read_bytes()))
    assert image.width > 3 * SIZE[1]
    assert f"]({SAMPLES_FILE})" in (folder / "README.md").read_text("utf-8")

    def out_of_memory(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nlong advice")

    monkeypatch.setattr("clora.commands.distill.draw_samples", out_of_memory)
    capsys.readouterr()
    assert distill(make_config(seed=1)) == folder
    assert "no samples.png is made: CUDA out of memory." in capsys.readouterr().err
    assert (folder / LORA_FILE).exists()
    assert not (folder / SAMPLES_FILE).exists(), "those of the collection that was replaced"
    assert SAMPLES_FILE not in (folder / "README.md").read_text("utf-8")
    distill(make_config(seed=1))
    assert "nothing is trained" in capsys.readouterr().err
