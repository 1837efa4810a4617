"""``clora prompts`` as a whole: from a config to a file that ``load_config`` reads."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from clora.cli import main
from clora.commands.distill import distill
from clora.commands.prompts import triggers, write, write_prompts
from clora.commands.prompts.wording import templates
from clora.commands.prompts.writers import Writer
from clora.config.everyday import everyday_instructions, everyday_topics
from clora.config.prompts_file import make_trigger, read_prompts
from clora.config.settings import load_config
from clora.data.images import load_image, load_images
from clora.data.rendering import Samples, render_targets
from clora.errors import CloraError
from clora.lora.load import load_lora
from clora.lora.save import save_lora
from clora.models import loading
from clora.models.common import to_pil
from clora.models.conditioning import Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.models.loading import with_guidance
from clora.testing import SIZE, random_lora, tiny_pipeline

NAMES = ("blueprint", "snow", "comic")
LENGTH = 90  # bytes are tokens of the tiny tokenizer, so that sentences are long


@pytest.fixture(scope="module")
def files(tmp_path_factory, adapter_of_session):
    """Three teachers and a folder of pictures."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        lora = random_lora(adapter_of_session.pipeline.transformer, 2, i)
        save_lora(lora, folder / f"{name}.safetensors", dtype=torch.float32)
    for kind in ("images", "before", "after"):
        (folder / kind).mkdir()
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / kind / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def adapter_of_session():
    return Flux2KleinAdapter(tiny_pipeline(), SIZE, LENGTH)


@pytest.fixture(autouse=True)
def few_references(monkeypatch):
    """Four ordinary texts to compare with, not all that ship."""
    monkeypatch.setattr(write, "everyday_instructions", lambda: everyday_instructions()[:4])


@pytest.fixture
def config_file(tiny_folder, files, tmp_path, monkeypatch):
    """Returns config_file(**sections): writes my.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)

    def make(first=(), **sections):
        effects = [{"name": n, "lora": str(files / f"{n}.safetensors"), "prompt": f"make it {n}"} for n in NAMES]
        effects[0].update(first)
        tree = {
            "pipeline": str(tiny_folder),
            "output": "out",
            "effects": effects,
            "data": {"sources": str(files / "images"), "size": list(SIZE), "max_sequence_length": LENGTH},
            "student": {"rank": 2},
            "sampler": {"steps": 4, "teacher_steps": 2},
            "train": {"updates": 1, "critic_ratio": 1, "batch_size": 4},
            "prompts": {"triggers": 2, "general": 12},
            "device": "cpu",
            "dtype": "float32",
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree), "utf-8")
        return "my.yaml"

    return make


@pytest.fixture
def fake_writer(monkeypatch):
    """Stands in for the pipeline's own language model; returns the requests that it was given."""

    def install(sees):
        requests = []

        def answer(request, seed):
            requests.append(request)
            subject = request[-1].split('"')[1] if '"' in request[-1] else request[0].split("about ")[1].split(":")[0]
            return "\n".join(
                f"{i}. {subject} so that it is {kind}" for i, kind in enumerate(("ice", "fire", "sand", "ink"))
            )

        monkeypatch.setattr(write, "pipeline_writer", lambda pipeline: Writer("a model", sees, answer))
        return requests

    return install


def unfilled(path, *overrides):
    return load_config(path, overrides, with_prompts=False)


def test_what_a_model_writes_is_what_training_reads(config_file, fake_writer):
    requests = fake_writer(sees=False)
    path = config_file(prompts={"general": 24, "triggers": 3})
    report = write_prompts(unfilled(path), "my.prompts.yaml")
    assert len(requests) == 3 + len(everyday_topics())
    assert [line.name for line in report] == list(NAMES)
    written = read_prompts("my.prompts.yaml")
    for line, effect in zip(report, written.effects, strict=True):
        kinds = ("ice", "fire", "sand", "ink")
        assert effect.student_prompts == tuple(f"{line.trigger} make it {line.name} so that it is {k}" for k in kinds)
        assert effect.trigger == line.trigger
        assert line.trigger in [make_trigger(line.name, variant) for variant in range(3)]
        assert (effect.written_by, line.written_by) == ("a model", "a model")
        assert effect.similarity == {"trigger": line.similarity.trigger[0], "prompt": line.similarity.prompt[0]}
    assert len(written.general_instructions) == 24
    assert written.general_instructions[0] == f"{next(iter(everyday_topics()))} so that it is ice"
    config = load_config(path, ["prompts.file=my.prompts.yaml"])
    assert config.effects[1].student_prompts == written.effects[1].student_prompts
    assert config.data.general_instructions == written.general_instructions
    assert "make it snow so that it is ice" in (distill(config) / "README.md").read_text("utf-8")


def test_a_model_that_sees_is_shown_what_the_teachers_make(config_file, fake_writer, files, adapter_of_session):
    """Both kinds of pairs: the user's own, and renders, made here by the engine's own parts."""
    requests = fake_writer(sees=True)
    path = config_file({"sources": str(files / "before"), "targets": str(files / "after")}, prompts={"general": 1})
    config = unfilled(path, "data.general_instructions=[brighten it]")
    write_prompts(config, "my.prompts.yaml")
    pictures = [[np.asarray(part) for part in request if not isinstance(part, str)] for request in requests]
    assert [len(shown) for shown in pictures] == [4, 4, 4]
    own = [to_pil(load_image(files / kind / f"{i}.png", SIZE)) for i in (0, 1) for kind in ("before", "after")]
    for shown, expected in zip(pictures[0], own, strict=True):
        assert np.array_equal(shown, np.asarray(expected))
    adapter = adapter_of_session
    pixels = load_images(files / "images", SIZE)[:2]
    sources = adapter.encode_sources([pixels])[0]
    text = adapter.encode_prompts(["make it snow", "make it comic", ""])
    for row, (name, shown) in enumerate(zip(NAMES[1:], pictures[1:], strict=True)):
        teacher = load_lora(files / f"{name}.safetensors", adapter.pipeline.transformer)
        samples = Samples.of_teachers(sources[None], torch.full((1, 2), row), torch.full((1, 2), 2), config.seed)
        settings = with_guidance(config, adapter)
        results = list(render_targets(adapter, {name: teacher}, samples, text, settings, lambda n: None))
        after = adapter.decode(torch.stack(results))
        for i in (0, 1):
            assert np.array_equal(shown[2 * i], np.asarray(to_pil(pixels[i])))
            difference = np.abs(shown[2 * i + 1].astype(int) - np.asarray(to_pil(after[i])).astype(int))
            assert difference.max() <= 1
    assert not np.array_equal(pictures[1][1], pictures[2][1]), "two teachers make the same"


def test_a_random_model_falls_back_to_templates(config_file, short_answers, capsys):
    path = config_file(prompts={"paraphrases": 2, "general": 3})
    report = write_prompts(unfilled(path), "my.prompts.yaml")
    written = read_prompts("my.prompts.yaml")
    for effect in written.effects:
        assert effect.student_prompts == tuple(f"{effect.trigger} {t}" for t in templates(f"make it {effect.name}")[:2])
    assert written.general_instructions == everyday_instructions()[:3]
    assert [line.written_by for line in report] == ["templates"] * 3
    err = " ".join(capsys.readouterr().err.split())
    assert "blueprint, snow, comic: templates (0 of 2 usable from Qwen3ForCausalLM of the pipeline in 3 answers)" in err
    assert "reads the teachers' prompts, it sees no pictures" in err
    first = Path("my.prompts.yaml").read_bytes()
    torch.rand(5)
    write_prompts(unfilled(path), "my.prompts.yaml", overwrite=True)
    assert Path("my.prompts.yaml").read_bytes() == first


def test_qwen_image_edit_as_a_whole(config_file, qwen_pipeline, files, monkeypatch, short_answers, capsys):
    """Its own language model sees what its teachers render; being random, it writes nothing of use."""
    from helpers.tiny_qwen_image import shrink

    shrink(monkeypatch, qwen_pipeline)
    monkeypatch.setattr(loading, "load_pipeline", lambda *_: qwen_pipeline)
    answer, seen = write.pipeline_writer(qwen_pipeline).answer, []

    def noted(pipeline):
        return Writer("Qwen", True, lambda request, seed: seen.append(request) or answer(request, seed))

    monkeypatch.setattr(write, "pipeline_writer", noted)
    teacher = files / "qwen.safetensors"
    save_lora(random_lora(qwen_pipeline.transformer, 2, 0), teacher)
    path = config_file(data={"size": [32, 32], "general_instructions": ["darken it"]})
    write_prompts(unfilled(path, f"effects=[{{name: a, lora: {teacher}, prompt: make it snow}}]"), "my.prompts.yaml")
    (effect,) = read_prompts("my.prompts.yaml").effects
    assert effect.student_prompts[0] == f"{effect.trigger} make it snow"
    assert "of 4 usable from Qwen in 3 answers" in " ".join(capsys.readouterr().err.split())
    before, after = [part for part in seen[0] if not isinstance(part, str)][:2]
    assert before.size == after.size == (32, 32)
    assert np.abs(np.asarray(before).astype(int) - np.asarray(after).astype(int)).mean() > 5


def test_a_seed_decides_what_a_model_writes(config_file, monkeypatch):
    """The same file twice, another with another seed; an effect's texts do not depend on the other effects."""

    def answer(request, seed):
        return "\n".join(f"make it {chr(97 + seed // 7**i % 7) * 5} and snow" for i in range(4))

    monkeypatch.setattr(write, "pipeline_writer", lambda pipeline: Writer("a model", False, answer))
    path = config_file(data={"general_instructions": ["darken it"]})
    texts = []
    for seed in (0, 0, 1):
        write_prompts(unfilled(path, f"seed={seed}", "prompts.triggers=1"), "my.prompts.yaml", overwrite=True)
        texts.append(Path("my.prompts.yaml").read_text("utf-8"))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    tree = yaml.safe_load(Path(path).read_text("utf-8"))
    tree["effects"] = tree["effects"][1:]
    Path("fewer.yaml").write_text(yaml.safe_dump(tree), "utf-8")
    write_prompts(unfilled("fewer.yaml", "seed=1"), "fewer.prompts.yaml")
    kept, fewer = read_prompts("my.prompts.yaml").effects[1:], read_prompts("fewer.prompts.yaml").effects
    for a, b in zip(kept, fewer, strict=True):
        assert [p.partition(" ")[2] for p in a.student_prompts] == [p.partition(" ")[2] for p in b.student_prompts]


def test_what_the_config_states_is_left_out(config_file, fake_writer):
    fake_writer(sees=False)
    path = config_file(
        {"student_prompts": ["<b> my own"], "trigger": "<b>"}, data={"general_instructions": ["darken it"]}
    )
    report = write_prompts(unfilled(path, "effects.1.trigger=<s>"), "my.prompts.yaml")
    assert [(line.trigger, line.written_by) for line in report[:2]] == [("<b>", "config"), ("<s>", "a model")]
    written = read_prompts("my.prompts.yaml")
    assert [effect.name for effect in written.effects] == ["snow", "comic"]
    assert written.effects[0].student_prompts[0] == "<s> make it snow so that it is ice"
    assert written.general_instructions == ()
    config = load_config(path, ["prompts.file=my.prompts.yaml"])
    assert config.effects[0].student_prompts == ("<b> my own",)
    assert config.data.general_instructions == ("darken it",)


def test_too_long_answers_are_refused_by_the_text_encoder(config_file, monkeypatch):
    long = "deep snow and " * 20
    monkeypatch.setattr(
        write, "pipeline_writer", lambda pipeline: Writer("a", False, lambda *_: f"{long}\nadd soft snow\nadd snow")
    )
    config = unfilled(config_file(prompts={"paraphrases": 2}), "data.general_instructions=[darken it]")
    write_prompts(config, "my.prompts.yaml")
    effect = read_prompts("my.prompts.yaml").effects[0]
    assert effect.student_prompts == (f"{effect.trigger} add soft snow", f"{effect.trigger} add snow")


@pytest.mark.parametrize("overrides", [["prompts.writer=templates"], []])
def test_only_templates(config_file, monkeypatch, capsys, overrides):
    """Asked for, or because the pipeline's text encoder cannot write."""
    if not overrides:
        monkeypatch.setattr(write, "pipeline_writer", lambda pipeline: None)
    write_prompts(unfilled(config_file(), *overrides), "my.prompts.yaml")
    effect = read_prompts("my.prompts.yaml").effects[0]
    assert effect.student_prompts[0] == f"{effect.trigger} make it blueprint"
    assert effect.written_by == "templates"
    assert ("cannot write" in capsys.readouterr().err) == (not overrides)


def test_edits_are_never_lost(config_file, tmp_path, monkeypatch):
    (tmp_path / "my.prompts.yaml").write_text("my edits", "utf-8")
    config = unfilled(config_file())
    monkeypatch.setattr(
        loading, "load_pipeline", lambda *_: pytest.fail("loads a pipeline before it looks for the file")
    )
    with pytest.raises(CloraError, match="already exists and may contain your edits; --overwrite replaces it"):
        write_prompts(config, "my.prompts.yaml")
    assert (tmp_path / "my.prompts.yaml").read_text("utf-8") == "my edits"


def test_nothing_to_write(config_file):
    overrides = [f"effects.{i}.student_prompts=[p{i}]" for i in range(3)]
    config = unfilled(config_file(data={"general_instructions": ["darken it"]}), *overrides)
    with pytest.raises(CloraError, match="nothing is left to write"):
        write_prompts(config, "my.prompts.yaml")


def test_a_target_is_missing(config_file, fake_writer, files, tmp_path):
    fake_writer(sees=True)
    (tmp_path / "after").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "after" / "1.png")
    path = config_file({"sources": str(files / "before"), "targets": str(tmp_path / "after")})
    with pytest.raises(CloraError, match=r"effect 'blueprint': .* found no pair for \['0', '2'\]"):
        write_prompts(unfilled(path), "my.prompts.yaml")


def test_a_family_that_encodes_prompts_with_a_picture_is_given_a_grey_one():
    class Sees:
        text_sees_image = True
        size = (4, 6)

        def encode_prompts(self, prompts, references=None):
            (pictures,) = references
            assert pictures.shape == (len(prompts), 3, 4, 6)
            assert not pictures.any()
            if "long" in prompts:
                raise CloraError("too long")
            return Text(torch.ones(len(prompts), 2, 3))

    assert triggers.encode_texts(Sees(), ["a", "b"]).embeds.shape == (2, 2, 3)
    assert write._fitting(Sees(), []) == []
    assert write._fitting(Sees(), ["a", "long", "b", "c", "long"]) == ["a", "b", "c"]


@pytest.mark.parametrize("stated", [True, False])
def test_the_command(config_file, fake_writer, monkeypatch, capsys, stated):
    fake_writer(sees=False)
    data = {"general_instructions": ["darken it"]}
    path = config_file(prompts={"file": "p.yaml"} if stated else {}, data=data)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["clora", "prompts", path, "prompts.paraphrases=3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    out = capsys.readouterr().out
    file = "p.yaml" if stated else "my.prompts.yaml"
    assert f"prompts: {file}\n" in out
    assert (f"write into my.yaml:  prompts: {{file: {file}}}" in out) == (not stated)
    for effect in read_prompts(file).effects:
        assert effect.trigger in out
        assert len(effect.student_prompts) == 3
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "--overwrite" in capsys.readouterr().err
