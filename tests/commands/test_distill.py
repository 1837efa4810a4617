"""The whole job on the user's own files, and what is said about files that cannot be used."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from helpers.pictures import write_images
from safetensors.torch import load_file, save_file

from clora.collection.write import LORA_FILE
from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.commands.plan.needs import rendering_rows
from clora.data import images as images_module
from clora.data import rendering as targets_module
from clora.data.encoders import Pictures, PromptTable
from clora.data.prepare import encode_data
from clora.data.rendering import Samples, render_targets
from clora.errors import CloraError
from clora.hashing import digest
from clora.lora.algebra import factorise
from clora.lora.families import FLUX2
from clora.lora.layers import linear_shapes
from clora.lora.load import load_lora, read_lora
from clora.lora.save import save_kohya, save_peft_folder
from clora.lora.source import content_hash
from clora.lora.state import LoRAState
from clora.models import loading
from clora.models.fingerprint import component_fingerprints
from clora.testing import SIZE, merge_lora, random_data, random_lora, random_teachers, tiny_config, tiny_pipeline
from clora.training.checkpoint import FREE_TO_CHANGE, check_resumable, save_state
from clora.training.trainer import DistillTrainer

EFFECTS = ("blueprint", "snow")


@pytest.fixture(scope="module")
def loras(adapter, tmp_path_factory):
    """Two teachers in different formats and of different ranks."""
    folder, transformer = tmp_path_factory.mktemp("loras"), adapter.pipeline.transformer
    save_kohya(random_lora(transformer, 3, 1), folder / "blueprint.safetensors", alpha=2.0, family=FLUX2)
    save_peft_folder(random_lora(transformer, 2, 2, ["transformer_blocks.0.attn.to_q"]), folder / "snow", alpha=1.0)
    return {"blueprint": folder / "blueprint.safetensors", "snow": folder / "snow"}


@pytest.fixture(scope="module")
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


def test_two_files_become_one_collection(make_config, loras, tiny_folder, tmp_path):
    config = make_config()
    folder = distill(config)
    assert folder == tmp_path / "out"
    assert {"README.md", LORA_FILE, "samples.png", "scheduler"} == {p.name for p in folder.iterdir()}
    pipeline = DiffusionPipeline.from_pretrained(tiny_folder)
    state = load_lora(folder, pipeline.transformer)
    assert state.max_rank == config.student.rank
    assert any(module.lora_B.any() for module in state.modules.values()), "the student learned nothing"
    pipeline.load_lora_weights(folder)
    assert pipeline.get_active_adapters()
    assert "make it blueprint" in state.metadata["clora.effects"]
    stated = {effect["name"]: effect for effect in json.loads(state.metadata["clora.effects"])}
    for name, lora in loras.items():
        assert stated[name]["teacher"] == lora.name
        assert stated[name]["teacher_sha256"] == content_hash(lora)
        assert stated[name]["prompts"] == list(next(e for e in config.effects if e.name == name).student_prompts)
    sampling = json.loads(state.metadata["clora.sampling"])
    assert (sampling["steps"], sampling["shift"], sampling["size"]) == (config.sampler.steps, 3.0, list(SIZE))
    assert state.metadata["clora.base_model"] == f"a local Flux2KleinPipeline (folder {tiny_folder.name})"
    assert json.loads(state.metadata["clora.provenance"])["train"]["updates"] == config.train.updates
    assert str(tmp_path) not in json.dumps(state.metadata), "paths of the machine"


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("me/klein", "me/klein"),
        ("tests/lora", "a local Flux2KleinPipeline (folder base)"),  # a folder here
        ("/somewhere/else", "a local Flux2KleinPipeline (folder base)"),
        (None, "a local Flux2KleinPipeline (folder base)"),
    ],
)
def test_the_base_is_called_as_its_folder_says(tiny_folder, adapter, tmp_path, monkeypatch, stated, expected):
    (tmp_path / "base").mkdir()
    (tmp_path / "tests" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    index = json.loads((tiny_folder / "model_index.json").read_text("utf-8")) | {"_name_or_path": stated}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index), "utf-8")
    assert engine._name_of_base(adapter.pipeline, tmp_path / "base") == expected


def test_given_targets_are_used(make_config, monkeypatch, tmp_path):
    sources, targets = write_images(tmp_path / "before", 3, 1), write_images(tmp_path / "after", 3, 2)
    seen = {}

    def train(config, used, teachers, data, report, checkpoint):
        seen.update(data=data, adapter=used)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_student", train)
    with pytest.raises(KeyboardInterrupt):
        distill(make_config({"sources": str(sources), "targets": str(targets)}))
    data = seen["data"]
    from clora.data.images import load_images

    for stacked, folder in ((data.sources, sources), (data.targets, targets)):
        expected = seen["adapter"].encode_images(load_images(folder, SIZE)[1])
        torch.testing.assert_close(stacked[0], expected, rtol=1e-5, atol=1e-5)
    assert data.effects == EFFECTS
    assert len(data.general_sources) == 3  # of 4 images one is held out
    assert data.sources.shape[:2] == (2, 3), "all given pairs, whatever sources_per_effect"
    for stacked in (data.sources[1], data.targets[1]):  # two rendered samples, repeated in turn
        assert torch.equal(stacked[2], stacked[0])
        assert not torch.equal(stacked[1], stacked[0])


def test_pictures_that_no_teacher_renders_are_not_read(make_config, adapter, loras, monkeypatch, tmp_path):
    own, read = write_images(tmp_path / "own", 5), []
    load = images_module.load_image
    monkeypatch.setattr(images_module, "load_image", lambda file, size: read.append(file) or load(file, size))
    config, shapes = make_config({"sources": str(own)}), linear_shapes(adapter.pipeline.transformer)
    teachers = {name: read_lora(file, shapes) for name, file in loras.items()}
    data = encode_data(config, adapter, teachers)
    assert sum(file.parent == own for file in read) == data.sources.shape[1] == 2


def test_targets_are_what_each_teacher_makes_of_its_own_sources(adapter):
    """Guided Euler by hand, on a plain transformer with the teacher merged in."""
    base = adapter.pipeline.transformer
    teachers = random_teachers(base, 2)
    data = random_data(adapter, list(teachers), sources=2)
    config = tiny_config(
        list(teachers),
        sampler={"teacher_steps": 3, "guidance": 2.0},
        train={"forward_rows": 6},
        data={"general_targets": 0},
    )
    passes = []
    samples = Samples.of_teachers(data.sources, data.teacher_text, data.empty_text, config.seed)
    out = torch.stack(list(render_targets(adapter, teachers, samples, data.text, config, passes.append)))
    out = out.unflatten(0, (2, 2))
    assert out.shape == data.sources.shape
    assert passes == [6] * 3 + [2] * 3
    assert rendering_rows(config) == 6
    assert rendering_rows(tiny_config(list(teachers), sampler={"guidance": 0.0}, train={"forward_rows": 1})) == 1
    assert rendering_rows(tiny_config(list(teachers), sampler={"guidance": 1.0})) == 2 * 16
    merged = merge_lora(base, list(teachers.values())[1])
    u = torch.tensor([1, 2 / 3, 1 / 3])
    sigmas = [*(3 * u / (1 + 2 * u)).tolist(), 0.0]
    x = torch.randn(adapter.latent_shape, generator=torch.Generator().manual_seed(1000 * (config.seed + 3)))[None]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        cond, uncond = (
            merged(
                hidden_states=torch.cat([x, data.sources[1, 1:]], 1),
                encoder_hidden_states=data.text.embeds[row],
                timestep=torch.tensor([sigma]),
                img_ids=adapter._own_image_ids,
                txt_ids=adapter._text_ids,
                return_dict=False,
            )[0][:, : x.shape[1]]
            for row in (data.teacher_text[1, 1:2], data.empty_text[1, 1:2])
        )
        x = x + (following - sigma) * (cond + 2 * (cond - uncond))
    torch.testing.assert_close(out[1, 1], x[0], rtol=1e-4, atol=1e-4)


def test_prompts_are_rows_of_one_table(adapter, tmp_path):
    """Student prompts are repeated in turn up to the longest list; a prompt has one row, whatever it is about."""
    before, after = write_images(tmp_path / "before", 2, 1), write_images(tmp_path / "after", 2, 2)
    pairs = {"prompt": "make it", "sources": str(before), "targets": str(after)}
    config = tiny_config(
        [
            {"name": "a", "lora": "a", "student_prompts": ("make it a", "turn it", "add"), **pairs},
            {"name": "b", "lora": "b", "student_prompts": ("brighten", "keep"), **pairs},
        ],
        data={"sources": str(before), "general_instructions": ("turn it", "a picture")},
    )
    data = encode_data(config, adapter, {"a": None, "b": None})

    def embedded(*prompts):
        return torch.cat([adapter.encode_prompts([prompt]).embeds for prompt in prompts])

    students = embedded("make it a", "turn it", "add", "brighten", "keep", "brighten")
    for m in range(2):
        torch.testing.assert_close(data.text.embeds[data.student_text[..., m].flatten()], students)
        torch.testing.assert_close(data.text.embeds[data.teacher_text[:, m]], embedded("make it", "make it"))
        torch.testing.assert_close(data.text.embeds[data.empty_text[:, m]], embedded("", ""))
    source, instruction, empty = data.general_pairs.unbind(1)
    assert sorted(zip(source.tolist(), instruction.tolist(), strict=True)) == sorted(
        (s, row) for s in range(2) for row in set(instruction.tolist())
    )
    assert len(data.text) == len({"make it", "make it a", "turn it", "add", "brighten", "keep", "a picture", ""})
    torch.testing.assert_close(data.text.embeds[instruction[:1]], embedded("turn it"))
    assert (empty == data.empty_text[0, 0]).all()


def test_a_prompt_that_is_encoded_with_its_image_has_a_row_for_each():
    class Encoding:
        def prompts(self, prompts, pixels):
            self.asked = (prompts, pixels)

    encoders, pixels = Encoding(), torch.randn(3, 3, 4, 4)
    table, pictures = PromptTable(text_sees_image=True), Pictures("some", pixels)
    first = table.rows("p", pictures, torch.tensor([2, 0, 2]))
    assert first.tolist() == [0, 1, 0]
    assert table.rows("q", pictures, torch.tensor([0])).tolist() == [2]
    assert table.rows("p", pictures._replace(name="others"), torch.tensor([2])).tolist() == [3]
    table.encode(encoders)
    assert encoders.asked[0] == ["p", "p", "q", "p"]
    assert torch.equal(encoders.asked[1], pixels[[2, 0, 0, 2]])
    assert table.prompts[1:3] == ["p", "q"]


def wrong_architecture(tmp_path):
    other = dataclasses.replace(random_lora(tiny_pipeline().transformer, 2, 0))
    modules = {f"other_blocks.{i}.proj": m for i, m in enumerate(other.modules.values())}
    from clora.lora.save import save_diffusers_lora

    path = tmp_path / "other.safetensors"
    save_diffusers_lora(dataclasses.replace(other, modules=modules), path)
    return {"first": {"lora": str(path)}}


def distilled_klein(tmp_path):
    tiny_pipeline(is_distilled=True).save_pretrained(tmp_path / "klein")
    return {"pipeline": str(tmp_path / "klein")}


def not_a_pipeline(tmp_path):
    tiny_pipeline().vae.save_pretrained(tmp_path / "vae")
    assert AutoencoderKLFlux2.load_config(tmp_path / "vae")
    return {"pipeline": str(tmp_path / "vae")}


def empty_images(tmp_path):
    (tmp_path / "empty").mkdir()
    return {"data": {"sources": str(tmp_path / "empty")}}


def unequal_names(tmp_path):
    before, after = write_images(tmp_path / "before", 3), write_images(tmp_path / "after", 3)
    (after / "2.png").rename(after / "two.png")
    return {"first": {"sources": str(before), "targets": str(after)}}


def unknown_class(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "newer")
    index = tmp_path / "newer" / "model_index.json"
    index.write_text(index.read_text().replace("Flux2KleinPipeline", "Flux9Pipeline"))
    return {"pipeline": str(tmp_path / "newer")}


def damaged_tokenizer(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer" / "tokenizer.json").write_text("{}")
    return {"pipeline": str(tmp_path / "damaged")}


def pickled_vae(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pickled")
    folder = tmp_path / "pickled" / "vae"
    weights = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), folder / "diffusion_pytorch_model.bin")
    weights.unlink()
    return {"pipeline": str(tmp_path / "pickled")}


def vae_without_some_weights(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "lacking")
    weights = tmp_path / "lacking" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({k: tensors[k] for k in sorted(tensors)[:-3]}, weights, {"format": "pt"})
    return {"pipeline": str(tmp_path / "lacking")}


def output_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    return {"output": str(tmp_path / "file")}


def cache_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    return {"data": {"cache": str(tmp_path / "file")}}


BAD = {
    "missing_lora": (lambda tmp: {"first": {"lora": str(tmp / "no.safetensors")}}, r"no\.safetensors does not exist"),
    "wrong_architecture": (wrong_architecture, "other.safetensors"),
    "distilled_klein": (distilled_klein, "is_distilled"),
    "no_pipeline_there": (
        lambda tmp: {"pipeline": str(tmp / "nothing")},
        "no such folder; expected a pipeline.s folder",
    ),
    "unknown_pipeline_class": (unknown_class, "newer diffusers"),
    "not_a_pipeline": (not_a_pipeline, "expected a folder as save_pretrained writes it"),
    "damaged_tokenizer": (damaged_tokenizer, "cannot be loaded"),
    "vae_without_some_weights": (vae_without_some_weights, "cannot be loaded"),
    "pickled_vae": (pickled_vae, r"diffusion_pytorch_model\.bin is a pickle.*save_pretrained"),
    "size": (lambda tmp: {"data": {"size": (18, 16)}}, "multiples of 4"),
    "overlong_prompt": (lambda tmp: {"first": {"prompt": "snow " * 60}}, "at most 40 tokens"),
    "overlong_student_prompt": (lambda tmp: {"first": {"student_prompts": ("snow " * 60,)}}, "at most 40 tokens"),
    "empty_images": (empty_images, "holds no images"),
    "all_held_out": (lambda tmp: {"data": {"held_out": 6}}, "held_out = 6 leaves none of the 4"),
    "unequal_names": (unequal_names, "one image of each name.*'2', 'two'"),
    "too_few_steps": (lambda tmp: {"sampler": {"steps": 1}}, "step below tau_max"),
    "no_such_device": (lambda tmp: {"device": "cuda:77"}, "CUDA devices"),
    "output_is_a_file": (output_is_a_file, "is a file"),
    "cache_is_a_file": (cache_is_a_file, "file is a file"),
    "unknown_target": (lambda tmp: {"student": {"targets": ("to_qq",)}}, "to_qq"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_and_leaves_no_collection(make_config, tmp_path, monkeypatch, case):
    make_bad, message = BAD[case]
    monkeypatch.setattr(targets_module, "render_targets", None)  # that takes hours: mistakes are told before
    with pytest.raises(CloraError, match=message):
        distill(make_config(**make_bad(tmp_path)))
    out = tmp_path / "out"
    assert not out.exists(), "not even an empty folder"


def test_given_targets_are_not_rendered_and_general_ones_are(make_config, monkeypatch, tmp_path):
    sources, targets = write_images(tmp_path / "before", 3, 1), write_images(tmp_path / "after", 3, 2)
    seen = {}
    render = targets_module.render_targets

    def rendered(adapter, teachers, *rest):
        seen.setdefault("names", []).append(list(teachers))
        return render(adapter, teachers, *rest)

    def train(config, used, teachers, data, report, checkpoint):
        seen.update(data=data, checkpoint=checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(targets_module, "render_targets", rendered)
    monkeypatch.setattr(engine, "train_student", train)
    with pytest.raises(KeyboardInterrupt):
        distill(make_config({"sources": str(sources), "targets": str(targets)}, data={"general_targets": 3}))
    assert seen["names"] == [[EFFECTS[1]], []], "the teacher without given targets, then the base"
    assert len(seen["data"].general_targets) == 3
    assert seen["data"].general_targets.std(0).any(), "each pair has its own render"
    assert seen["checkpoint"].parent == tmp_path / "out"


def test_a_stopped_run_says_what_it_kept_and_from_where_it_goes_on(make_config, monkeypatch, capsys):
    config, stop_after = make_config(train={"updates": 3, "checkpoint_every": 2}), 1
    iterate = DistillTrainer._iterate

    def stopping(trainer, progress):
        if trainer.update == stop_after:
            raise KeyboardInterrupt
        return iterate(trainer, progress)

    monkeypatch.setattr(DistillTrainer, "_iterate", stopping)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    assert "of the training nothing is kept before the first checkpoint" in capsys.readouterr().err
    stop_after = 2
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    assert "the same command goes on from update 2" in capsys.readouterr().err
    stop_after = None
    distill(config)
    assert "going on from update 2 of" in capsys.readouterr().err
    distill(config.model_copy(update={"seed": 1}))
    assert "finished collection of other settings or inputs, which this run replaces" in capsys.readouterr().err


@pytest.fixture
def finished(make_config, monkeypatch):
    """A config whose collection is finished, and the list of the configs that are trained from then on."""
    config, trained, train = make_config(), [], engine.train_student
    distill(config)
    monkeypatch.setattr(engine, "train_student", lambda config, *rest: trained.append(config) or train(config, *rest))
    return config, trained


def files_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_collection_is_not_trained_again(finished, tmp_path, capsys):
    config, trained = finished
    before = files_of(tmp_path / "out")
    elsewhere = {"device": "auto", "data": config.data.model_copy(update={"cache": str(tmp_path / "kept")})}
    for again in (config, config.model_copy(update=elsewhere)):
        assert distill(again) == tmp_path / "out"
        assert "nothing is trained. To train it again, remove that folder" in capsys.readouterr().err
    assert not trained
    assert files_of(tmp_path / "out") == before


def test_what_earlier_versions_wrote_counts_as_the_same_run(make_config, adapter, monkeypatch, tmp_path):
    """They compared and hashed ``~`` as it was written, and a setting that was removed since, switched off."""
    monkeypatch.setenv("HOME", str(tmp_path))
    files = sorted(write_images(tmp_path / "own", 2).iterdir())
    config = make_config(data={"sources": "~/own"}, output="~/out")
    left_out = {"pipeline": True, "output": True, "device": True, "data": {"cache"}}
    settings = config.model_dump(mode="json", exclude=left_out)
    settings["sampler"]["integer_timesteps"] = False
    assert settings["data"]["sources"] == "~/own"
    inputs = {
        "settings": settings,
        "instructions": config.data.general_instructions,
        "pictures": {"~/own": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}},
        "pipeline": component_fingerprints(adapter.pipeline),
    }
    assert engine.inputs_digest(config, adapter.pipeline) == digest(inputs)


@pytest.mark.parametrize("was_on", [False, True])
def test_a_checkpoint_of_an_earlier_version_goes_on(make_config, tmp_path, was_on):
    config, file = make_config(), tmp_path / "c.safetensors"
    written = config.model_dump(mode="json", exclude={"output": True, "device": True, **FREE_TO_CHANGE})
    written["sampler"]["integer_timesteps"] = was_on
    save_state(file, {}, {}, {}, {"config": written, "update": 7})
    if was_on:
        with pytest.raises(CloraError, match="sampler differ"):
            check_resumable(file, config)
    else:
        assert check_resumable(file, config) == 7


def changed_setting(config, images, out):
    return config.model_copy(update={"train": config.train.model_copy(update={"updates": 1})})


def changed_teacher_prompt(config, images, out):
    effects = (config.effects[0].model_copy(update={"prompt": "make it a drawing"}), *config.effects[1:])
    return config.model_copy(update={"effects": effects})


def changed_picture(config, images, out):
    (images / "0.png").write_bytes((images / "1.png").read_bytes())
    return config


def damaged_weights(config, images, out):
    (out / LORA_FILE).write_bytes((out / LORA_FILE).read_bytes()[:-8])
    return config


def lost_scheduler(config, images, out):
    (out / "scheduler" / "scheduler_config.json").unlink()
    return config


def another_base(config, images, out):
    pipeline = tiny_pipeline(seed=1)
    pipeline.save_pretrained(out.parent / "pipeline")
    return config.model_copy(update={"pipeline": str(out.parent / "pipeline")})


CHANGES = (changed_setting, changed_teacher_prompt, changed_picture, damaged_weights, lost_scheduler, another_base)


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_trained_again(make_config, monkeypatch, tmp_path, change):
    images = write_images(tmp_path / "own", 4)
    config = make_config(data={"sources": str(images)})
    distill(config)
    monkeypatch.setattr(engine, "train_student", interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(change(config, images, tmp_path / "out"))


def test_what_was_encoded_and_rendered_is_kept_until_the_collection_is_written(
    make_config, monkeypatch, tmp_path, capsys
):
    config, output = make_config(), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_student", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    assert "what was encoded and rendered is kept for the same command" in capsys.readouterr().err
    assert {file.name for file in (output / engine.CACHE).iterdir()} == {"prompts", "sources", "targets"}
    monkeypatch.setattr(targets_module, "render_targets", None)
    distill(config)
    assert not (output / engine.CACHE).exists(), "the folder is made to be shared"


def test_runs_share_a_folder_of_their_own(make_config, monkeypatch, tmp_path):
    shared = {"cache": str(tmp_path / "kept")}
    distill(make_config(data=shared))
    assert not (tmp_path / "out" / engine.CACHE).exists()
    monkeypatch.setattr(targets_module, "render_targets", None)
    distill(make_config(data=shared, output=str(tmp_path / "other"), train={"learning_rate": 1e-3}))
    assert (tmp_path / "kept" / "targets").is_dir()


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_teachers_licence_reaches_the_collection(make_config, loras, tmp_path):
    licensed = tmp_path / "licensed.safetensors"
    save_file(load_file(loras["blueprint"]), licensed, {"format": "pt", "modelspec.license": "CC-BY-4.0"})
    folder = distill(make_config({"lora": str(licensed)}))
    assert "CC-BY-4.0" in (folder / "README.md").read_text("utf-8")


def test_a_device_that_is_not_there(monkeypatch, tiny_folder):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(CloraError, match="no Apple GPU"):
        engine.load_pipeline(str(tiny_folder), "mps")


def test_a_readme_of_someone_elses_is_not_overwritten(make_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my project")
    with pytest.raises(CloraError, match=r"another README\.md"):
        distill(make_config())
    assert (tmp_path / "out" / "README.md").read_text() == "my project"


def test_a_checkpoint_of_other_settings_is_told_before_anything_is_rendered(make_config, monkeypatch):
    def no_disk(*arguments):
        raise CloraError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("clora.commands.distill.write_collection", no_disk)
        with pytest.raises(CloraError, match="disk is full"):
            distill(make_config())  # trained whole: the checkpoint stays
    monkeypatch.setattr(targets_module, "render_targets", None)
    with pytest.raises(CloraError, match=r"written by another run \(seed differ"):
        distill(make_config(seed=99))


def test_a_pipeline_saved_in_bfloat16_runs_in_one_type(tmp_path):
    """transformers keeps the type of a text encoder's file, diffusers makes the rest fp32."""
    pipeline = tiny_pipeline()
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    loaded = engine.load_pipeline(str(tmp_path), "cpu")
    assert loaded.text_encoder.dtype == loaded.transformer.dtype == torch.float32
    assert loaded.encode_prompt("a red circle", max_sequence_length=40)[0].dtype == torch.float32


def test_a_teacher_that_is_not_exact_is_told(monkeypatch, capsys):
    """A full change of a layer may be taken as factors of a lower rank, as far as its effect allows."""
    transformer = tiny_pipeline().transformer
    shapes, module = linear_shapes(transformer), "transformer_blocks.0.attn.to_q"
    delta = torch.randn(shapes[module], generator=torch.Generator().manual_seed(0))

    def load(path, shapes, weights, max_error):
        factors, error = factorise(delta, max_rank=16, max_error=max_error)
        assert error <= max_error, "as read_lora checks"
        return LoRAState({module: factors}, errors={module: error})

    monkeypatch.setattr(loading, "read_lora", load)
    effect = tiny_config([{"name": "full", "lora": "full", "prompt": "p", "max_error": 0.7}]).effects[0]
    state = loading.load_teacher(effect, shapes, {})
    error = float((state.modules[module].delta() - delta).norm() / delta.norm())
    assert 0.1 < error <= 0.7
    assert (
        f"effect full: 1 layers without low rank became factors, error {error:.2%} at most" in capsys.readouterr().err
    )
