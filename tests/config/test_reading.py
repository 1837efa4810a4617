"""Config files: their values, and messages about everything wrong in them."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from helpers.configs import TEXT
from pydantic import ValidationError

from clora.config.everyday import everyday_instructions, everyday_topics
from clora.config.prompts_file import make_trigger
from clora.config.settings import DistillConfig, general_instructions, load_config
from clora.errors import CloraError
from clora.testing import tiny_config


def test_the_signature_of_a_config_names_its_validators():
    assert "lambda" not in str(inspect.signature(DistillConfig))


def test_defaults_and_values(load):
    config = load()
    snow, comic = config.effects
    assert snow.trigger == make_trigger("snow fall")
    assert snow.student_prompts == (f"{snow.trigger} make it snow",)
    assert comic.student_prompts == ("<c> one", "<c> two")
    assert config.data.size == (64, 96)
    assert config.train.learning_rate == 1e-3  # without a dot, which plain YAML would read as text
    assert (config.sampler.steps, config.sampler.shift) == (8, 3.0)


def test_trigger_is_deterministic_and_unique():
    assert make_trigger("snow fall") == "<snow_fall_Xe4025>"
    names = [f"effect {i}" for i in range(2000)] + ["snow-fall", "snow fall", "été"]
    assert len({make_trigger(name) for name in names}) == len(names)
    variants = [make_trigger("snow fall", variant) for variant in range(50)]
    assert variants[0] == make_trigger("snow fall")
    assert len(set(variants)) == 50
    assert all(re.fullmatch(r"<snow_fall_[A-Z][a-z]\d{4}>", variant) for variant in variants)


def test_trigger_of_a_long_name_is_short():
    long = [make_trigger(f"a very long name of some effect or other, number {i}") for i in range(9)]
    assert all(re.fullmatch(r"<a_very_long_name_of_some_[A-Z][a-z]\d{4}>", trigger) for trigger in long)
    assert len(set(long)) == 9


def test_overrides(load):
    config = load("train.updates=7", "sampler.steps=4", "effects.1.lora=x.safetensors", "data.size=[32, 32]")
    assert (config.train.updates, config.sampler.steps) == (7, 4)
    assert (Path(config.effects[1].lora).name, config.data.size) == ("x.safetensors", (32, 32))


def test_a_setting_that_was_removed_is_refused_even_where_it_is_off(load):
    with pytest.raises(CloraError, match=r"c\.yaml: sampler\.integer_timesteps: was removed, since no stock scheduler"):
        load(text=TEXT + "sampler: {integer_timesteps: false}\n")


def test_paths_are_resolved_and_dumped_as_written(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {
        "pipeline": "~/base",
        "output": "~/out",
        "effects.0.lora": "~/a.safetensors",
        "effects.0.sources": "~/before",
        "effects.0.targets": "~/after",
        "data.sources": "~/photos",
        "data.general_instructions": "~/edits.txt",
        "data.cache": "~/cache",
    }
    config = load(*(f"{key}={path}" for key, path in paths.items()))
    effect, data = config.effects[0], config.data
    found = (config.pipeline, config.output, effect.lora, effect.sources, effect.targets)
    found += (data.sources, data.general_instructions, data.cache)
    assert found == tuple(path.replace("~", "/home/me") for path in paths.values())
    dumped = json.dumps(config.model_dump(mode="json"))
    assert all(f'"{path}"' in dumped for path in paths.values())
    assert "/home/me" not in dumped


def test_paths_are_relative_to_the_configs_folder(load, tmp_path, monkeypatch):
    """Those of overrides too. A record states what was written, so that a run may be continued from anywhere."""
    (tmp_path / "owner" / "here").mkdir(parents=True)
    paths = ["data.sources=./photos//here/", "pipeline=owner/name", "prompts.writer=~/qwen", f"output={tmp_path}/out"]
    config = load(*paths)
    assert config.data.sources == f"{tmp_path}/./photos//here/"
    assert (config.pipeline, config.output) == ("owner/name", f"{tmp_path}/out")
    assert config.prompts.writer == str(Path("~/qwen").expanduser())
    assert load("pipeline=owner/here").pipeline == f"{tmp_path}/owner/here", "a folder that exists is no hub id"
    monkeypatch.chdir(tmp_path)
    here = load_config("c.yaml", paths)
    assert (here.data.sources, here.pipeline) == ("./photos//here/", "owner/name")
    assert here.recorded() == config.recorded()


@pytest.mark.parametrize("setting", ["data.sources", "pipeline", "effects.0.lora", "prompts.file"])
def test_a_path_that_is_only_in_the_working_directory(load, tmp_path, monkeypatch, setting):
    (tmp_path / "elsewhere" / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    message = rf"c\.yaml: {setting}: paths are relative to the config's own folder, .*write elsewhere.owner.name"
    with pytest.raises(CloraError, match=message):
        load(f"{setting}=owner/name")
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("effects: []\n")
    with pytest.raises(CloraError) if setting == "prompts.file" else nullcontext() as refused:
        load(f"{setting}=owner/name")
    assert "working directory" not in str(refused)


def test_unset_trigger_means_default(load):
    assert load("effects.1.trigger=null", "effects.1.student_prompts=[]").effects[1].trigger == make_trigger("comic")


def test_frozen(load):
    with pytest.raises(ValidationError):
        load().seed = 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.updats=4", r"train\.updats: unknown key; did you mean 'updates'"),
        ("effects.0.promt=x", r"effects\.0\.promt: unknown key; did you mean 'prompt'"),
        ("objective.weights.anchoring=1", r"objective\.weights\.anchoring: unknown key"),
        ("zzz=1", "zzz: unknown key; expected one of pipeline, output"),
        ("train.updates='9'", r"train\.updates: expected a whole number, found '9' \(text\)"),
        ("train.updates=2.5", r"train\.updates: expected a whole number, found 2\.5"),
        ("seed=true", r"seed: expected a whole number, found True \(true or false\)"),
        ("objective.dual_stream=1", r"objective\.dual_stream: expected true or false"),
        ("data.sources=", r"data\.sources: expected text, found nothing"),
        ("data.size=[1, 2, 3]", r"data\.size: expected at most 2 items, found a list of 3"),
        ("data.general_instructions=5", r"expected a list or text, found 5 \(a number\)"),
        ("sampler=4", r"sampler: expected a section of keys, found 4"),
        ("student.rank=0", r"student\.rank: expected greater than or equal to 1, found 0"),
        ("sampler.steps=0", r"sampler\.steps"),
        ("objective.switch_probability=1.5", r"objective\.switch_probability: expected less than or equal to 1"),
        ("train.minutes=.inf", r"train\.minutes: expected a finite number"),
        ("student.init=random", r"student\.init: expected 'zero', 'merge' or 'least_squares', found 'random'"),
        ("device=gpu", "device: expected auto, cpu"),
        ("effects=[]", r"effects: expected at least 1 item"),
        ("effects.1.name=snow fall", "two effects have the name 'snow fall'"),
        ("effects.0.trigger=<c>", "two effects have the trigger '<c>'"),
        ("effects.1.trigger=<other>", "'<c> one' lacks the trigger '<other>'"),
        ("effects.0.targets=there", r"effects\.0: targets needs sources"),
        ("data.general_instructions=[]", r"needs data\.general_instructions"),
        ("train.export=ema", r"train: export: ema needs ema_decay"),
        ("train.warmup_updates=10", r"train: warmup_updates: expected fewer than updates, 10, found 10"),
        ("train.ema_decay=1.0", r"train\.ema_decay: expected less than 1"),
        ("train.schedule=step", r"train\.schedule: expected 'constant', 'linear' or 'cosine'"),
        ("sampler.integer_timesteps=true", r"sampler\.integer_timesteps: was removed.*delete the key"),
        ("objective.tau_rule=released", r"objective\.tau_rule: was removed.*one rule.*delete the key"),
        ("output=~nobody-of-this-name/out", "output: ~nobody-of-this-name/out: .*write the path in full"),
        (r'data.sources="a\0b"', r"data\.sources: expected a path, found .* zero byte"),
        (r'data.general_instructions="a\0b"', r"data\.general_instructions: expected a path, found .* zero byte"),
        ("effects.2.name=x", "expected an entry from 0 to 1, found '2'"),
        ("pipeline.x=1", "'x' is inside text"),
        ("train.updates", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed=[1", "override 'seed=.*not valid YAML"),
    ],
)
def test_wrong_value(load, override, message):
    with pytest.raises(CloraError, match=message):
        load(override)


def test_all_parts_off(load):
    off = [f"objective.{part}=false" for part in ("backward_simulation", "target_simulation")]
    assert load(*off).objective.trajectory_anchoring
    for last in ("objective.trajectory_anchoring=false", "objective.weights.trajectory_anchoring=0"):
        with pytest.raises(CloraError, match="nothing left to train on"):
            load(*off, last)


def test_every_problem_is_listed(load):
    wrong = TEXT.replace("updates", "updats").replace("rank: 8", "rank: x").replace("name: snow fall", "name: ")
    with pytest.raises(CloraError) as caught:
        load(text=wrong)
    heading, *problems = str(caught.value).splitlines()
    assert heading.endswith("c.yaml: 4 problems")
    for path in ("train.updats", "train.updates", "student.rank", "effects.0.name"):
        assert sum(problem.startswith(f"  {path}: ") for problem in problems) == 1


def test_missing_values_that_others_are_made_of_are_listed(load):
    """A trigger is made of the name, a student's prompt of the prompt: their absence is not an error of its own."""
    with pytest.raises(CloraError) as caught:
        load(
            text=TEXT.replace("name: snow fall, ", "").replace(
                "prompt: draw it, trigger: <c>, student_prompts: [<c> one, <c> two]", "ignore: []"
            )
        )
    _, *problems = str(caught.value).splitlines()
    assert [problem.split("; ")[0].strip() for problem in problems] == [
        "effects.0.name: missing",
        "effects.1.prompt: missing",
    ]


@pytest.mark.parametrize(
    ("overrides", "heading"),
    [
        (["train.updates=x"], "override 'train.updates=x': train.updates: expected"),
        (["train={}"], "override 'train={}': train.updates: missing"),
        (["data.size=[1, 2]", "data.size=[a, 1]"], "override 'data.size=[a, 1]': data.size.0: expected"),
        (["device=gpu"], "FILE with device=gpu: device: expected"),
        (["effects.0.targets=t", "seed=1"], "FILE with effects.0.targets=t: effects.0: targets needs sources"),
    ],
)
def test_a_mistake_in_an_override_is_not_the_files(load, tmp_path, overrides, heading):
    with pytest.raises(CloraError) as caught:
        load(*overrides)
    assert str(caught.value).startswith(heading.replace("FILE", str(tmp_path / "c.yaml")))


def test_mistakes_of_the_file_and_of_overrides_are_kept_apart(load, tmp_path):
    with pytest.raises(CloraError) as caught:
        load("train.updats=4", "seed=5", text=TEXT.replace("rank: 8", "rank: x"))
    heading, *problems = str(caught.value).splitlines()
    assert heading == "2 problems"
    assert any(problem.startswith("  override 'train.updats=4': train.updats: unknown key") for problem in problems)
    assert any(problem.startswith(f"  {tmp_path / 'c.yaml'}: student.rank: expected") for problem in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of keys to values, found nothing"),
        ("- a", "found a list"),
        ("pipeline: a\noutput: [b", "c.yaml line 2: not valid YAML"),
        ("output: {{name}}", "c.yaml line 1: not valid YAML: expected a word as key"),
        ("pipeline: a\npipeline: b", "line 2: .*'pipeline' is given twice"),
        ("pipeline: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: &x [*x]", "repeated by an alias"),
        ("pipeline: a", r"train: missing; expected the training settings, at least `updates`$"),
    ],
)
def test_malformed_file(load, text, message):
    with pytest.raises(CloraError, match=message):
        load(text=text)


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(CloraError, match="does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CloraError, match=r"b\.yaml: expected a YAML file, found no UTF-8 text; .* save it as UTF-8"):
        load_config(tmp_path / "b.yaml")
    (tmp_path / "b.yaml").write_bytes(b"GIF\x00\x01")
    with pytest.raises(CloraError, match=r"b\.yaml: expected YAML, .*found the character '\\x00' at position 3;"):
        load_config(tmp_path / "b.yaml")
    with pytest.raises(CloraError, match=r"expected a YAML file, found a folder; name the file in it$"):
        load_config(tmp_path)


def test_one_text_is_one_override(load, tmp_path):
    load()
    assert load_config(tmp_path / "c.yaml", "seed=7").seed == 7


def test_general_instructions(load, tmp_path):
    assert general_instructions(load().data) == ("brighten it",)
    shipped = general_instructions(load(text=TEXT.replace(", general_instructions: [brighten it]", "")).data)
    assert shipped == everyday_instructions()
    file = tmp_path / "lines.txt"
    data = load(f"data.general_instructions={file}").data
    with pytest.raises(
        CloraError, match=r"^data\.general_instructions: .*lines\.txt does not exist; expected a text file"
    ):
        general_instructions(data)
    file.write_text("\n")
    with pytest.raises(CloraError, match="is empty"):
        general_instructions(data)
    file.write_text("one\n\n two \n")
    assert general_instructions(data) == ("one", "two")


def test_the_example_loads_and_its_comments_are_valid_settings(tmp_path):
    example = Path(__file__).parents[2] / "clora" / "templates" / "distill.yaml"
    shipped = load_config(example)
    text, count = re.subn(r"(?m)^( *)# ( *\w+: )", r"\1\2", example.read_text("utf-8"))
    assert count > 20
    (tmp_path / "all.yaml").write_text(text, "utf-8")
    written = "effects: [{name: claymation, trigger: <c>, student_prompts: [<c> soft grey clay]}]"
    (tmp_path / "my.prompts.yaml").write_text(written, "utf-8")
    config = load_config(tmp_path / "all.yaml")
    assert config.objective == shipped.objective, "commented values of the method are the defaults"
    assert (config.seed, config.device, config.train.clip) == (shipped.seed, shipped.device, shipped.train.clip)
    assert config.effects[0].student_prompts[0].startswith(config.effects[0].trigger)
    assert config.effects[1].student_prompts == ("<c> soft grey clay",)
    assert config.prompts == shipped.prompts.model_copy(update={"file": str(tmp_path / "my.prompts.yaml")})


def test_the_everyday_edits_that_ship():
    topics, mixed = everyday_topics(), everyday_instructions()
    assert sorted(mixed) == sorted(line for lines in topics.values() for line in lines)
    assert len(set(mixed)) == len(mixed) >= 90
    assert list(mixed[: len(topics)]) == [lines[0] for lines in topics.values()], "one of each topic first"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"effects": ["student"]}, "no effect can be called 'student'"),
        (
            {
                "effects": [
                    {"name": name, "lora": name, "prompt": "p", "student_prompts": ("the same",)} for name in ("a", "b")
                ]
            },
            "two effects have the student prompt 'the same'",
        ),
    ],
)
def test_settings_that_contradict_one_another(sections, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(sections.pop("effects"), **sections)


def test_anchoring_first_needs_anchoring():
    config = tiny_config(["a"], train={"anchor_share": 0.5})
    assert config.anchor_share == 0.5
    off = config.model_copy(update={"objective": config.objective.model_copy(update={"trajectory_anchoring": False})})
    assert off.anchor_share == 0.0


def test_a_seed_beyond_every_generator_is_refused():
    with pytest.raises(ValueError, match="seed"):
        tiny_config(["a"], seed=2**31)


def test_settings_of_writing_are_no_part_of_what_is_trained():
    config = tiny_config(["a"], prompts={"writer": "templates"})
    assert config.prompts.writer == "templates"
    assert "prompts" not in config.model_dump(mode="json"), "else a checkpoint could not be resumed with other ones"


def test_keys_to_ignore_change_the_record_only_where_there_are_some(tmp_path):
    """Checkpoints and collections of runs without them are as before."""
    text = "pipeline: base\noutput: out\ndata: {sources: a, size: [64, 64]}\nstudent: {rank: 8}\ntrain: {updates: 10}\n"
    effects = "effects: [{{name: snow, lora: a.safetensors, prompt: make it snow, ignore: {}}}]\n"
    recorded = {}
    for ignore in ("null", "[]", "[lora_te]"):
        (tmp_path / "a.yaml").write_text(text + effects.format(ignore))
        recorded[ignore] = load_config(tmp_path / "a.yaml").recorded()["effects"][0]
    assert "ignore" not in recorded["null"]
    assert recorded["null"] == recorded["[]"]
    assert recorded["[lora_te]"] == recorded["null"] | {"ignore": ["lora_te"]}


@pytest.mark.parametrize("preset", [None, "paper"])
def test_a_section_that_states_nothing_has_the_defaults(load, tmp_path, preset):
    load()
    expected = load_config(tmp_path / "c.yaml", preset=preset)
    load(text=f"{TEXT}sampler:\nobjective:\n  weights:\nprompts:\n")
    assert load_config(tmp_path / "c.yaml", preset=preset) == expected


def test_a_section_without_a_needed_key(load):
    with pytest.raises(CloraError, match="data.sources: .*missing"):
        load(text=TEXT[: TEXT.index("data:")] + "data:\n")
