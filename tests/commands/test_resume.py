"""Runs that were stopped, are finished already, or have changed."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from helpers.pictures import write_images
from helpers.trainers import stop_at
from helpers.written import files_of
from safetensors.torch import load_file, save_file

from clora.collection.write import LORA_FILE
from clora.commands import distill as engine
from clora.commands.distill import distill
from clora.commands.inputs import inputs_digest, read_inputs
from clora.config.settings import ADDED, NEVER_RECORDED
from clora.data import rendering as targets_module
from clora.errors import CloraError
from clora.hashing import digest
from clora.models.fingerprint import component_fingerprints
from clora.report.history import HISTORY, read_history
from clora.testing import tiny_pipeline
from clora.training.checkpoint import save_state
from clora.training.resume import FREE_TO_CHANGE, Checkpoints
from clora.training.trainer import DistillTrainer


def interrupt(*arguments):
    raise KeyboardInterrupt


def test_a_stopped_run_reports_what_it_kept_and_from_where_it_goes_on(make_config, monkeypatch, capsys, tmp_path):
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
    assert "resuming at update 2 of" in capsys.readouterr().err
    records = read_history(tmp_path / "out" / HISTORY)
    assert [record.update for record in records] == [2, 3], "what was stopped and what went on"
    distill(config.model_copy(update={"seed": 1}))
    assert "finished collection of other settings or inputs, which this run replaces" in capsys.readouterr().err


def test_a_least_squares_start_is_fitted_once_before_the_training(make_config, monkeypatch, capsys, tmp_path):
    """Its progress is shown before that of the training; a run that goes on has its student in the checkpoint."""
    config = make_config(student={"init": "least_squares"}, train={"checkpoint_every": 1}, data={"general_targets": 3})
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    before, fitted, after = capsys.readouterr().err.partition("least-squares start: done")
    assert fitted
    assert "distil into" not in before
    assert "distil into" in after
    resumed = load_file(distill(config) / LORA_FILE)
    assert "least-squares" not in capsys.readouterr().err
    whole = load_file(distill(config.model_copy(update={"output": str(tmp_path / "whole")})) / LORA_FILE)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_finished_collection_is_not_trained_again(finished, tmp_path, capsys):
    config, trained = finished
    before = files_of(tmp_path / "out")
    elsewhere = {"device": "auto", "data": config.data.model_copy(update={"cache": str(tmp_path / "kept")})}
    for again in (config, config.model_copy(update=elsewhere)):
        assert distill(again) == tmp_path / "out"
        assert "nothing is trained. To train it again, remove that folder" in capsys.readouterr().err
    assert not trained
    assert files_of(tmp_path / "out") == before


def as_before(settings):
    """The settings as the first version wrote them."""
    settings["sampler"]["integer_timesteps"] = False
    settings["objective"]["tau_rule"] = "paper"
    del settings["objective"]["weighting"]
    for key in ("teacher_guidance", "teacher_norm_rescale"):
        del settings["sampler"][key]
    settings["data"].pop("general_pairs", None)
    for key in (*ADDED["train"], *NEVER_RECORDED["train"]):
        settings["train"].pop(key, None)
    if settings["train"].get("gradient_rows") == "auto":
        settings["train"]["gradient_rows"] = None  # their default
    for effect in settings["effects"]:
        del effect["ignore"]
    return settings


def test_what_earlier_versions_wrote_counts_as_the_same_run(make_config, adapter, monkeypatch, tmp_path):
    """They compared and hashed ``~`` as it was written, and other settings, of which none changes this run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    files = sorted(write_images(tmp_path / "own", 2).iterdir())
    sections = {"output": "~/out", "objective": {"target_simulation": False}, "dtype": "auto"}
    config = make_config(data={"sources": "~/own"}, **sections)
    left_out = {"pipeline": True, "output": True, "device": True, "data": {"cache"}}
    settings = as_before(config.model_dump(mode="json", exclude=left_out))
    assert settings["data"]["sources"] == "~/own"
    inputs = {
        "settings": settings,
        "instructions": config.data.general_instructions,
        "pictures": {"~/own": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}},
        "pipeline": component_fingerprints(adapter.pipeline),
    }
    assert inputs_digest(config, read_inputs(config, adapter.pipeline)) == digest(inputs)


@pytest.fixture
def earlier_checkpoint(make_config, tmp_path):
    """Writes what an earlier version kept of a run, and returns the run's config and the file."""

    def write(integer_timesteps=False, **objective):
        config, file = make_config(objective=objective), tmp_path / "c.safetensors"
        written = as_before(config.model_dump(mode="json", exclude={"output": True, "device": True, **FREE_TO_CHANGE}))
        written["sampler"]["integer_timesteps"] = integer_timesteps
        values = {"config": written, "update": 1, "seconds": 0.0, "matching": False, "teachers": {}}
        save_state(file, {}, {}, torch.Generator(), values)
        return file, config

    return write


def start(file, config):
    return Checkpoints(file.parent / "checkpoints", earlier=file).start(config)


def test_a_checkpoint_of_an_earlier_version_goes_on(earlier_checkpoint, capsys):
    file, config = earlier_checkpoint(target_simulation=False)
    assert start(file, config) == (file, 1)
    assert "earlier version, which did not record pictures" in capsys.readouterr().err
    objective = config.objective.model_copy(update={"weighting": "per_sample"})
    with pytest.raises(CloraError, match=r"objective\.weighting was"):
        start(file, config.model_copy(update={"objective": objective}))
    with pytest.raises(CloraError, match=r"sampler\.integer_timesteps was"):
        start(*earlier_checkpoint(target_simulation=False, integer_timesteps=True))


def test_a_checkpoint_of_other_noise_levels_is_refused(earlier_checkpoint):
    with pytest.raises(
        CloraError, match=r"earlier version with objective\.tau_rule, which was removed, since .*remove it"
    ):
        start(*earlier_checkpoint())


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
    assert [file.name for file in (output / engine.CACHE).iterdir()] == ["finished.safetensors"], "it is to be shared"


def test_runs_share_a_folder_of_their_own(make_config, monkeypatch, tmp_path):
    shared = {"cache": str(tmp_path / "kept")}
    distill(make_config(data=shared))
    assert not [entry for entry in (tmp_path / "out" / engine.CACHE).iterdir() if entry.is_dir()]
    monkeypatch.setattr(targets_module, "render_targets", None)
    distill(make_config(data=shared, output=str(tmp_path / "other"), train={"learning_rate": 1e-3}))
    assert (tmp_path / "kept" / "targets").is_dir()


def test_a_checkpoint_of_other_settings_is_refused_before_anything_is_rendered(make_config, monkeypatch):
    def no_disk(*arguments):
        raise CloraError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("clora.commands.distill.write_collection", no_disk)
        with pytest.raises(CloraError, match="disk is full"):
            distill(make_config())  # trained whole: the checkpoint stays
    monkeypatch.setattr(targets_module, "render_targets", None)
    with pytest.raises(CloraError, match=r"written by another run \(seed was 0"):
        distill(make_config(seed=99))


def edited_picture(job):
    (job["own"] / "1.png").write_bytes((job["own"] / "0.png").read_bytes())


def new_picture(job):
    (job["own"] / "9.png").write_bytes((job["own"] / "0.png").read_bytes())


def edited_instructions(job):
    job["edits"].write_text("darken the picture\n")


def negated_teacher(job):
    tensors = load_file(job["lora"])
    save_file({k: -v if "lora_up" in k or "lora_B" in k else v for k, v in tensors.items()}, job["lora"])


def another_model(job):
    tiny_pipeline(seed=1).save_pretrained(job["pipeline"])


NAMED = {
    edited_picture: r"picture .*own/1\.png has changed",
    new_picture: r"picture .*own/3\.png is new",  # one is held out
    edited_instructions: "the list of general instructions has changed",
    negated_teacher: "the LoRA of effect 'blueprint' has changed",
    another_model: "the base model's transformer has changed",
}


@pytest.fixture
def stopped(make_config, adapter, loras, monkeypatch, tmp_path):
    """A run of three updates that was stopped before the last, and the files that it reads."""
    job = {"own": write_images(tmp_path / "own", 4), "edits": tmp_path / "edits.txt"}
    job["edits"].write_text("brighten the picture\n")
    job["lora"] = tmp_path / "blueprint.safetensors"
    shutil.copy(loras["blueprint"], job["lora"])
    job["pipeline"] = tmp_path / "pipeline"
    adapter.pipeline.save_pretrained(job["pipeline"])
    config = make_config(
        {"lora": str(job["lora"])},
        pipeline=str(job["pipeline"]),
        data={"sources": str(job["own"]), "general_instructions": str(job["edits"])},
        train={"updates": 3, "checkpoint_every": 1},
    )
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    return config, job


@pytest.mark.parametrize("change", NAMED, ids=lambda change: change.__name__)
def test_other_inputs_are_refused_by_name_before_anything_is_rendered(stopped, monkeypatch, change):
    config, job = stopped
    change(job)
    monkeypatch.setattr(engine, "encode_data", None)
    with pytest.raises(CloraError, match=NAMED[change]):
        distill(config)


def test_what_is_not_trained_on_may_change(stopped, capsys):
    config, job = stopped
    (job["own"] / "3.png").write_bytes((job["own"] / "0.png").read_bytes())  # held out
    job["edits"].write_text("\n  brighten the picture\n\n")
    distill(config)
    assert "resuming at update 2" in capsys.readouterr().err


def test_a_run_whose_newest_checkpoint_is_damaged_ends_like_an_uninterrupted_one(stopped, capsys, tmp_path):
    config, _ = stopped
    file = tmp_path / "out" / engine.CHECKPOINT / "00000002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    resumed = load_file(distill(config) / LORA_FILE)
    said = capsys.readouterr().err
    assert "00000002.safetensors is damaged" in said
    assert "resuming at update 1" in said
    whole = load_file(distill(config.model_copy(update={"output": str(tmp_path / "whole")})) / LORA_FILE)
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_pictures_that_change_while_they_are_read_are_noticed(make_config, monkeypatch, tmp_path):
    images = write_images(tmp_path / "own", 4)
    encode = engine.encode_data

    def encoding(*arguments):
        (images / "0.png").write_bytes((images / "1.png").read_bytes())
        return encode(*arguments)

    monkeypatch.setattr(engine, "encode_data", encoding)
    with pytest.raises(CloraError, match="pictures have changed while they were read"):
        distill(make_config(data={"sources": str(images)}))


def test_what_a_killed_run_left_half_written_is_removed(make_config, tmp_path):
    cache = tmp_path / "kept"
    for folder, name in (
        (tmp_path / "out", LORA_FILE),
        (tmp_path / "out" / "scheduler", "scheduler_config.json"),
        (tmp_path / "out" / engine.CHECKPOINT, "00000001.safetensors"),
        (cache / "targets", f"{'0' * 64}.safetensors"),
    ):
        (folder / f".{name}.abcd_123.tmp").mkdir(parents=True)
    distill(make_config(data={"cache": str(cache)}))
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory"), OSError("gone"), CloraError("damaged"), KeyError()]
)
def test_no_sample_picture_is_worth_a_training(make_config, monkeypatch, capsys, tmp_path, error):
    written = []

    def failing(*arguments):
        written.append((tmp_path / "out" / LORA_FILE).exists())
        raise error

    monkeypatch.setattr(engine, "draw_samples", failing)
    distill(make_config())
    assert written == [True], "the collection comes first"
    assert "no samples.png is made" in capsys.readouterr().err
    monkeypatch.setattr(engine, "train_student", interrupt)
    distill(make_config())
    assert "nothing is trained" in capsys.readouterr().err
