"""``clora studio example``: the folder is one that ``clora distill`` takes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clora.config.settings import general_instructions, load_config
from clora.errors import CloraError
from clora.studio import example
from clora.studio.assets import pipeline_folder
from clora.studio.effects import EFFECTS


@pytest.fixture
def studio(monkeypatch, tmp_path):
    """A studio whose teachers are empty files."""
    monkeypatch.setattr(example, "NUM_IMAGES", 2)
    folder = tmp_path / "studio"
    shutil.copytree(pipeline_folder(), folder / "pipeline")
    (folder / "teachers").mkdir()
    for name in ("snow", "darkroom"):
        (folder / "teachers" / f"{name}.safetensors").touch()
    return folder


def test_an_example_is_a_config_with_its_pictures(studio, tmp_path):
    path = example.write_example(tmp_path / "mine", studio, ["snow", "darkroom"])
    config = load_config(path)
    assert [effect.name for effect in config.effects] == ["snow", "darkroom"]
    assert config.pipeline == str(studio / "pipeline")
    assert config.effects[0].prompt == EFFECTS["snow"].prompt
    assert len({*config.effects[0].student_prompts, *config.effects[1].student_prompts}) == 6
    pictures = sorted(Path(config.data.sources).iterdir())
    assert len(pictures) == 2
    assert all(Image.open(picture).size == (128, 128) for picture in pictures)
    assert np.asarray(Image.open(pictures[0])).std() > 5
    instructions = general_instructions(config.data)
    assert len(instructions) == len(set(instructions)) > 60
    assert not any("{" in text for text in instructions)
    assert "CC" in (tmp_path / "mine" / "ATTRIBUTION.md").read_text("utf-8")
    assert str(path) in path.read_text("utf-8").splitlines()[0]


def test_a_config_is_not_replaced(studio, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "distill.yaml").write_text("mine")
    with pytest.raises(CloraError, match=r"distill\.yaml exists; name another folder"):
        example.write_example(folder, studio, ["snow"])
    assert [file.name for file in folder.iterdir()] == ["distill.yaml"]


@pytest.mark.parametrize(("name", "words"), [("snwo", "unknown effect 'snwo'.*snow"), ("rain", "no teacher of 'rain'")])
def test_an_effect_that_is_not_there_is_named_before_anything_is_written(studio, tmp_path, name, words):
    with pytest.raises(CloraError, match=words):
        example.write_example(tmp_path / "new", studio, [name])
    assert not (tmp_path / "new").exists()
