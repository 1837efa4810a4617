"""``clora studio example``: the folder is one that ``clora distill`` takes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clora.config.settings import general_instructions, load_config
from clora.errors import CloraError
from clora.studio.assets import pipeline_folder
from clora.studio.next import example
from clora.studio.next.effects import EFFECTS


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(example, "NUM_IMAGES", 2)


def test_an_example_is_a_config_with_its_pictures(few, tmp_path):
    path = example.write_example(tmp_path / "mine", ["snow", "negative"])
    config = load_config(path)
    assert [effect.name for effect in config.effects] == ["snow", "negative"]
    assert config.pipeline == str(pipeline_folder())
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


def test_a_config_is_not_replaced(few, tmp_path):
    (tmp_path / "distill.yaml").write_text("mine")
    with pytest.raises(CloraError, match=r"distill\.yaml exists; name another folder"):
        example.write_example(tmp_path, ["snow"])
    assert [file.name for file in tmp_path.iterdir()] == ["distill.yaml"]


def test_an_unknown_effect_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(CloraError, match=r"unknown effect 'snwo'.*snow"):
        example.write_example(tmp_path / "new", ["snwo"])
    assert not (tmp_path / "new").exists()
