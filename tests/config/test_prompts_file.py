"""The prompts file: written, read back and filled into a config; messages about a wrong one."""

from __future__ import annotations

import pytest

from clora.config.prompts_file import EffectPrompts, PromptsFile, make_trigger, prompts_text, read_prompts
from clora.config.settings import load_config
from clora.errors import CloraError

CONFIG = """
pipeline: base
output: out
effects:
  - {name: snow, lora: a.safetensors, prompt: make it snow}
  - {name: comic strip, lora: b, prompt: draw it}
data: {sources: photos, size: [64, 96]}
student: {rank: 8}
train: {updates: 10}
prompts: {file: my.prompts.yaml}
"""
PROMPTS = """
effects:
- name: snow
  trigger: <s>
  student_prompts: [<s> white flakes fall, all over <s> lies snow]
- name: comic strip
  trigger: <c>
  student_prompts: [<c> thin ink]
general_instructions: [brighten it, darken it]
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Returns load(*overrides, prompts=PROMPTS): the config, read beside a prompts file."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides, prompts=PROMPTS, config=CONFIG):
        (tmp_path / "my.yaml").write_text(config, "utf-8")
        if prompts is not None:
            (tmp_path / "my.prompts.yaml").write_text(prompts, "utf-8")
        return load_config("my.yaml", overrides)

    return run


def test_fills_what_the_config_leaves_out(load):
    config = load()
    snow, comic = config.effects
    assert (snow.trigger, snow.student_prompts) == ("<s>", ("<s> white flakes fall", "all over <s> lies snow"))
    assert (comic.trigger, comic.student_prompts) == ("<c>", ("<c> thin ink",))
    assert config.data.general_instructions == ("brighten it", "darken it")


def test_triggers_must_be_unique_only_when_the_file_has_filled_them(load):
    """The second effect's trigger is the first's default one, which the file replaces."""
    config = load(f"effects.1.trigger={make_trigger('snow')}", prompts=PROMPTS.replace("<c>", make_trigger("snow")))
    assert [effect.trigger for effect in config.effects] == ["<s>", make_trigger("snow")]


def test_the_config_wins(load):
    config = load("effects.0.student_prompts=[<s> mine]", "data.general_instructions=[mine]")
    assert config.effects[0].student_prompts == ("<s> mine",)
    assert config.effects[0].trigger == "<s>"
    assert config.data.general_instructions == ("mine",)
    with pytest.raises(CloraError, match="'<s> white flakes fall' lacks the trigger '<mine>'"):
        load("effects.0.trigger=<mine>")


def test_an_unset_key_is_filled(load):
    config = load("effects.0.student_prompts=[]", "effects.0.trigger=null", "data.general_instructions=null")
    assert config.effects[0].student_prompts[0] == "<s> white flakes fall"
    assert config.data.general_instructions == ("brighten it", "darken it")


def test_without_a_file_the_default_stays(load):
    config = load("prompts.file=null")
    trigger = make_trigger("snow")
    assert config.effects[0].student_prompts == (f"{trigger} make it snow",)
    assert config.data.general_instructions is None


def test_unread_where_it_is_written(tmp_path, load):
    load()
    (tmp_path / "my.prompts.yaml").unlink()
    config = load_config("my.yaml", with_prompts=False)
    assert config.effects[0].trigger == make_trigger("snow")


def without(name):
    """The prompts file without an effect."""
    start = PROMPTS.index(f"- name: {name}")
    ends = [i for i in (PROMPTS.find("- name", start + 1), PROMPTS.index("general")) if i > 0]
    return PROMPTS[:start] + PROMPTS[min(ends) :]


def test_an_effect_may_be_missing_where_the_config_states_its_prompts(load):
    config = load("effects.0.student_prompts=[mine]", prompts=without("snow"))
    assert config.effects[0].student_prompts == ("mine",)
    assert config.effects[1].trigger == "<c>"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, r"my\.yaml: prompts\.file: my\.prompts\.yaml does not exist; write it with: clora prompts my\.yaml"),
        (without("snow"), r"my\.prompts\.yaml: lacks the effects \['snow'\]"),
        (
            PROMPTS.replace("name: snow", "name: snou"),
            r"the config has no effect 'snou'; rename .* remove it; did you mean 'snow'\?$",
        ),
        (PROMPTS.replace("name: comic strip", "name: snow"), "the effect 'snow' appears twice"),
        (PROMPTS.replace("<c> thin", "thin"), r"effects\.1: student_prompts: 'thin ink' lacks the trigger '<c>'"),
        (PROMPTS.replace("[<c> thin ink]", "[]"), r"effects\.1\.student_prompts: expected at least 1 item"),
        (PROMPTS.replace("[<c> thin ink]", "<c> thin ink"), r"effects\.1\.student_prompts: expected a list"),
        (PROMPTS.replace("  trigger: <c>\n", ""), r"effects\.1\.trigger: missing; expected the student's unique word"),
        (PROMPTS.replace("trigger: <c>", "triger: <c>"), r"effects\.1\.triger: unknown key; did you mean 'trigger'"),
        (PROMPTS.replace("<c>", "<s>"), "two effects have the trigger '<s>'"),
        ("effects: [", r"my\.prompts\.yaml line \d+: not valid YAML"),
        ("- a", "expected a mapping"),
    ],
)
def test_wrong_file(load, prompts, message):
    with pytest.raises(CloraError, match=message):
        load(prompts=prompts)


@pytest.mark.parametrize(
    "override", ["prompts=my.prompts.yaml", "prompts.file=3", "prompts.fil=x", "prompts.paraphrases=0"]
)
def test_wrong_section(load, override):
    with pytest.raises(CloraError, match=override.partition("=")[0]):
        load(override)


def test_a_malformed_config_is_reported_by_its_own_check(load):
    for override in ("effects=3", "effects=[3]", "data=3"):
        with pytest.raises(CloraError, match=f"^override '{override[:4]}.*: {override[:4]}"):
            load(override)


def test_an_effect_that_the_config_has_twice_is_reported(load):
    """Not of the prompts file, which has one effect that the config then lacks."""
    with pytest.raises(CloraError, match=r"my\.yaml.*two effects have the name 'snow'"):
        load("effects.1.name=snow")


def test_round_trip(tmp_path):
    """Any text is read back as it was written, from a file that is easy on the eye."""
    odd = ("<t> a: b, 'c' \"d\" # e", "<t> {f} [g] - h", "<t> ünïcödé 雪\nnext line", "<t> " + "long " * 60)
    effect = EffectPrompts(
        name="x: y", trigger="<t>", student_prompts=odd, written_by="templates", similarity={"trigger": 0.5}
    )
    prompts = PromptsFile(effects=(effect,), general_instructions=("yes it is", "12 birds"))
    text = prompts_text(prompts, "my.prompts.yaml")
    (tmp_path / "p.yaml").write_text(text, "utf-8")
    assert read_prompts(tmp_path / "p.yaml") == prompts
    assert text.startswith("# Written by `clora prompts`")
    assert "prompts: {file: my.prompts.yaml}" in text
    assert "ünïcödé 雪" in text
    assert max(map(len, text.splitlines())) <= 120
