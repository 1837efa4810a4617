"""Presets: what they set, and what replaces it."""

from __future__ import annotations

import re

import pytest
import yaml

from clora.config.presets import describe_preset, read_preset
from clora.config.settings import load_config
from clora.errors import CloraError
from clora.files import TEMPLATES

PLAIN = """
pipeline: base
output: out
effects: [{name: snow, lora: a.safetensors, prompt: make it snow}]
data: {sources: photos, size: [64, 96]}
"""


@pytest.fixture
def load(tmp_path):
    """Returns load(*overrides, text=PLAIN, preset=None)."""

    def run(*overrides, text=PLAIN, preset=None):
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return load_config(path, overrides, preset=preset)

    return run


def test_the_paper(load):
    """docs/method.md, sections 4 and 5."""
    config = load(preset="paper")
    objective, train = config.objective, config.train
    assert (config.student.rank, config.student.init) == (128, "zero")
    assert (config.sampler.steps, config.sampler.shift, config.sampler.guidance) == (8, 3.0, 4.0)
    assert (config.sampler.teacher_steps, config.data.general_targets, config.anchor_share) == (40, 0, 0)
    assert (objective.weighting, objective.switch_probability, objective.switch_every) == ("per_sample", 0.5, 1)
    assert set(objective.weights.model_dump().values()) == {1.0}
    assert (objective.anchor_noise, objective.norm_rescale) == ("unrestricted", False)
    assert all((objective.backward_simulation, objective.target_simulation, objective.trajectory_anchoring))
    assert (train.updates, train.critic_ratio, train.batch_size, train.clip) == (5000, 5, 8, 10)
    assert (train.learning_rate, train.critic_learning_rate, train.schedule) == (1e-4, 1e-4, "constant")
    assert (train.optimizer, train.weight_decay, train.warmup_updates) == ("adamw", 0.01, 0)


def test_ours_is_the_examples(tmp_path):
    """Without the lines that are marked, the preset makes the example whole again."""
    text = (TEMPLATES / "distill.yaml").read_text("utf-8")
    kept, count = re.subn(r"(?m)^.*# recipe.*\n", "", text)
    assert count >= 8
    (tmp_path / "c.yaml").write_text(kept.replace("student:\n", ""))
    found, example = load_config(tmp_path / "c.yaml", preset="clora"), load_config(TEMPLATES / "distill.yaml")
    assert found.model_dump(mode="json") == example.model_dump(mode="json")
    with pytest.raises(CloraError, match="student: missing"):
        load_config(tmp_path / "c.yaml")


def test_the_file_replaces_a_preset_and_overrides_replace_both(load):
    text = PLAIN + "train: {updates: 7, batch_size: 2}\nstudent: {targets: [to_q]}\n"
    config = load("train.batch_size=3", "objective.weights.target_simulation=0.5", text=text, preset="paper")
    assert (config.train.updates, config.train.batch_size, config.train.weight_decay) == (7, 3, 0.01)
    assert (config.student.rank, config.student.targets) == (128, ("to_q",))
    assert (config.objective.weights.target_simulation, config.objective.weights.trajectory_anchoring) == (0.5, 1.0)
    shown = describe_preset("paper", config)
    heading, *sets = shown.split("\nyour own settings are\n")[0].splitlines()
    assert heading == "preset paper sets"
    assert {"  student.rank=128", "  student.init=zero", "  objective.dual_stream=true"} <= set(sets)
    assert shown.split("\nyour own settings are\n")[1].splitlines() == [
        "  objective.weights.target_simulation=0.5 instead of 1.0",
        "  train.updates=7 instead of 5000",
        "  train.batch_size=3 instead of 8",
    ]
    assert "your own" not in describe_preset("clora", load(preset="clora"))


@pytest.mark.parametrize("name", ["paper", "clora"])
def test_a_preset_names_nothing_that_is_the_users(load, name):
    assert set(read_preset(name)) <= {"data", "student", "sampler", "objective", "train"}
    assert not {"sources", "size", "cache"} & set(read_preset(name)["data"])
    assert yaml.safe_load((TEMPLATES / f"preset-{name}.yaml").read_text("utf-8")) == read_preset(name)


def test_an_unknown_preset_is_refused(load):
    with pytest.raises(CloraError, match="preset: expected clora or paper, found 'papr'; did you mean 'paper'"):
        load(preset="papr")


def test_a_section_that_is_no_section_is_still_an_error(load):
    with pytest.raises(CloraError, match="train: expected a section of keys, found 5"):
        load(text=PLAIN + "train: 5\n", preset="paper")
