"""Bounds of what a config may hold: numbers, digits, levels, aliases, and the length of what is said about them."""

from __future__ import annotations

import json
import re

import pytest
from helpers.configs import TEXT

from clora.config.reading import _model_in
from clora.config.settings import DistillConfig, load_config
from clora.errors import CloraError


def test_many_digits_are_read_at_once(load):
    """Of a number that is none: the pattern must not try every way to split it."""
    with pytest.raises(CloraError, match=r"train\.updates"):
        load("train.updates=" + "1" * 100_000 + "x")


@pytest.mark.parametrize("value", ["!!timestamp x", "!!bool x", "!!int x", "!!float x", "!!omap x", "!!set x"])
def test_tags_that_do_not_fit(load, value):
    with pytest.raises(CloraError, match=r"override 'seed=!!"):
        load(f"seed={value}")


def test_a_bomb_of_aliases(load, tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(CloraError, match=r"c\.yaml line 2: .*repeated by an alias; write it out"):
        load(text="\n".join(lines))
    assert load("objective.weights={backward_simulation: &one 1.0, target_simulation: *one}").objective.weights


def test_a_file_that_is_too_large(load):
    with pytest.raises(CloraError, match=r"c\.yaml: expected a YAML file of at most 4 MB, found \d+ bytes"):
        load(text=TEXT + "#" * 4_000_000)


NUMBERS = [
    "data.size.0",
    "data.max_sequence_length",
    "data.held_out",
    "data.sources_per_effect",
    "data.general_targets",
    "data.general_pairs",
    "effects.0.max_error",
    "student.rank",
    "sampler.steps",
    "sampler.shift",
    "sampler.teacher_steps",
    "sampler.guidance",
    "sampler.teacher_guidance",
    "sampler.guidance_embedding",
    "prompts.paraphrases",
    "prompts.triggers",
    "prompts.general",
    "seed",
    "objective.switch_probability",
    "objective.switch_every",
    "objective.weights.backward_simulation",
    "train.updates",
    "train.anchor_share",
    "train.anchor_learning_rate",
    "train.critic_ratio",
    "train.batch_size",
    "train.learning_rate",
    "train.critic_learning_rate",
    "train.warmup_updates",
    "train.weight_decay",
    "train.ema_decay",
    "train.clip",
    "train.gradient_rows",
    "train.forward_rows",
    "train.teacher_memory_gb",
    "train.checkpoint_every",
    "train.preview_every",
    "train.keep_checkpoints",
    "train.minutes",
    "train.stop_after",
]


@pytest.mark.parametrize("value", [10**30, 1e308, -1, float("inf"), float("nan")])
@pytest.mark.parametrize("key", NUMBERS)
def test_an_absurd_number_is_one_problem_of_its_key(load, key, value):
    text = {"inf": ".inf", "nan": ".nan"}.get(str(value), str(value))
    with pytest.raises(CloraError, match=re.escape(key)) as raised:
        load(f"{key}={text}")
    assert "\n" not in str(raised.value)


def test_every_number_of_a_config_is_tested():
    def numbers(model, prefix=""):
        for name, field in model.model_fields.items():
            inner = _model_in(field.annotation)
            if inner is not None:
                yield from numbers(inner, f"{prefix}{name}.{'0.' if 'tuple' in str(field.annotation) else ''}")
            elif re.search(r"\b(int|float)\b", f"{field.annotation}") and "Literal[32" not in str(field.annotation):
                yield f"{prefix}{name}"

    tested = {key.removesuffix(".0") for key in NUMBERS}
    assert {key for key in numbers(DistillConfig) if "weights" not in key} <= tested


def test_levels_without_end(load):
    for text in ("a: " + "[" * 10**5, "- " * 10**5, "a: " + "{a: " * 40):
        with pytest.raises(CloraError, match="at most 30 levels"):
            load(text=text)


def test_a_long_value_is_shown_in_part(load):
    for key in ("device", "train.updates", "effects.0.name", "x"):
        with pytest.raises(CloraError) as raised:
            load(f"{key}={'x' * 10**5}", f"effects.1.name={'x' * 10**5}")
        assert len(str(raised.value)) < 5000


def test_of_a_thousand_problems_the_first_are_shown(tmp_path):
    tree = {"pipeline": "base", "output": list(range(3)), "data": {"general_instructions": [1] * 1000}}
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    with pytest.raises(CloraError, match=r"c.yaml: 10\d\d problems") as caught:
        load_config(tmp_path / "c.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 42
    assert re.fullmatch(r"  and 9\d\d more", lines[-1])


def test_weight_decay_that_would_turn_weights_over(load):
    with pytest.raises(CloraError, match="weight_decay: expected below 100, 1 / the highest learning rate, found 100"):
        load("train.learning_rate=0.01", "train.critic_learning_rate=0.001", "train.weight_decay=100")
    assert load("train.learning_rate=0.01", "train.weight_decay=99").train.weight_decay == 99


def test_a_date_is_a_name(load, tmp_path):
    """Also where the prompts file is of another name, with which it is compared."""
    text = TEXT.replace("name: snow fall", "name: 2001-01-01")
    assert load(text=text).effects[0].name == "2001-01-01"
    (tmp_path / "p.yaml").write_text("effects: [{name: other, trigger: <o>, student_prompts: [<o> one]}]")
    with pytest.raises(CloraError, match="the config has no effect 'other'"):
        load(text=f"{text}prompts: {{file: p.yaml}}\n")


@pytest.mark.parametrize("value", ["!!timestamp 2001-01-01", "!!binary eA==", "!!set {a: }", "!!omap [a: 1]"])
def test_tags_of_other_kinds_are_refused(load, value):
    with pytest.raises(CloraError, match="not valid YAML|does not fit its !! tag"):
        load(text=TEXT.replace("name: snow fall", f"name: {value}"))
