"""``dtype: auto`` is what the run was begun in, on whatever machine it goes on or is found finished."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers import tiny_z_image
from helpers.trainers import make_trainer, stop_at
from helpers.written import files_of, rewrite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clora.collection.metadata import LORA_FILE, read_collection
from clora.commands.distill import CHECKPOINT, FINISHED, distill
from clora.commands.folder import with_run_dtype
from clora.commands.inputs import inputs_digest, read_inputs
from clora.commands.plan.make import make_plan
from clora.errors import CloraError
from clora.lora.save import save_lora
from clora.models.loading import load_adapter
from clora.testing import random_lora
from clora.training.checkpoint import load_values
from clora.training.trainer import DistillTrainer

MACHINES = {"float32": "bfloat16", "bfloat16": "float32"}
"""What ``auto`` is where a run begins, and where it goes on."""


@pytest.fixture
def machine(monkeypatch):
    """Sets whether the CPU has AMX, by what ``auto`` is for a new run."""

    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)

    def change(dtype):
        capabilities = {"amx_bf16": dtype == "bfloat16"}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    return change


@pytest.fixture
def stopped(make_config, machine, monkeypatch):
    """Begins a run on a machine and stops it before its third update; returns its config and folder."""

    def begin(dtype, there):
        machine(there)
        config = make_config(train={"updates": 3, "checkpoint_every": 1}, dtype=dtype)
        with monkeypatch.context() as patch:
            stop_at(2, patch)
            with pytest.raises(KeyboardInterrupt):
                distill(config)
        return config

    return begin


@pytest.fixture
def z_image(make_config, tmp_path):
    """Makes configs of a family whose latents are in float32, whatever the dtype of its base."""
    pipeline = tiny_z_image.tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "z")
    lora = str(tmp_path / "z.safetensors")
    save_lora(random_lora(pipeline.transformer, 2, 1), tmp_path / "z.safetensors")

    def make(**sections):
        config = make_config(
            data={"size": (64, 80), "max_sequence_length": 56}, pipeline=str(tmp_path / "z"), **sections
        )
        effects = tuple(effect.model_copy(update={"lora": lora}) for effect in config.effects)
        return config.model_copy(update={"effects": effects})

    return make


def newest(output):
    return output / CHECKPOINT / "00000002.safetensors"


@pytest.mark.parametrize("there", MACHINES)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_stopped_run_goes_on_in_its_dtype(stopped, machine, tmp_path, capsys, dtype, there):
    config = stopped(dtype, there)
    taken = there if dtype == "auto" else dtype
    assert load_values(newest(tmp_path / "out"))["dtype"] == taken
    whole = distill(config.model_copy(update={"output": str(tmp_path / "whole")}))
    machine(MACHINES[there])
    capsys.readouterr()
    distill(config)
    said = capsys.readouterr().err
    assert "resuming at update 2" in said
    assert (f"dtype: auto is {taken} here, as of the run that" in said) == (dtype == "auto")
    assert read_collection(tmp_path / "out").provenance["dtype"] == taken
    assert (tmp_path / "out" / LORA_FILE).read_bytes() == (whole / LORA_FILE).read_bytes()


@pytest.mark.parametrize("there", MACHINES)
@pytest.mark.parametrize(("dtype", "alone"), [("auto", False), ("auto", True), ("float32", False)])
def test_a_finished_run_stays_finished(make_config, machine, tmp_path, capsys, dtype, there, alone):
    machine(there)
    config = make_config(dtype=dtype)
    distill(config)
    if alone:
        (tmp_path / "out" / FINISHED).unlink()  # as where the collection was copied
    before = files_of(tmp_path / "out")
    machine(MACHINES[there])
    distill(config)
    assert "nothing is trained" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("there", MACHINES)
def test_a_finished_run_is_lengthened_in_its_dtype(make_config, machine, tmp_path, capsys, there):
    machine(there)
    distill(make_config(train={"updates": 1}, dtype="auto"))
    machine(MACHINES[there])
    distill(make_config(train={"updates": 2}, dtype="auto"))
    assert "going on at update 1" in capsys.readouterr().err
    assert read_collection(tmp_path / "out").provenance["dtype"] == there


@pytest.mark.parametrize("there", MACHINES)
def test_auto_is_the_same_run_as_its_dtype(stopped, tmp_path, capsys, there):
    config = stopped("auto", there)
    distill(config.model_copy(update={"dtype": there}))
    assert "resuming at update 2" in capsys.readouterr().err
    distill(config)
    assert "nothing is trained" in capsys.readouterr().err


@pytest.mark.parametrize("there", MACHINES)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_stopped_run_in_another_dtype_is_refused(stopped, monkeypatch, dtype, there):
    config = stopped(dtype, there)
    taken = there if dtype == "auto" else dtype
    other = MACHINES[taken]
    monkeypatch.setattr(DistillTrainer, "_iterate", None)  # nothing is trained
    expected = rf"expected dtype {taken}, found {other}; set dtype to {taken} or auto to continue it, or remove it"
    with pytest.raises(CloraError, match=expected):
        distill(config.model_copy(update={"dtype": other}))


def test_a_finished_run_in_another_dtype_is_another_run(make_config, tmp_path, capsys):
    config = make_config(dtype="float32")
    distill(config)
    distill(config.model_copy(update={"dtype": "bfloat16"}))
    said = capsys.readouterr().err
    assert "training begins anew, and not where the finished run has ended" in said
    assert "expected dtype float32, found bfloat16" in said
    assert read_collection(tmp_path / "out").provenance["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_checkpoint_that_lacks_the_dtype_goes_on(stopped, machine, tmp_path, capsys, dtype):
    config = stopped(dtype, "float32")

    def as_before(flat, values):
        del values["dtype"]
        return {**values, "config": {**values["config"], "dtype": dtype}}

    rewrite(newest(tmp_path / "out"), as_before)
    machine("bfloat16")
    distill(config)
    assert "resuming at update 2" in capsys.readouterr().err
    assert read_collection(tmp_path / "out").provenance["dtype"] == "float32"


def make_collection_earlier(output, config):
    """Earlier versions recorded no dtype; they hashed the setting."""
    filled, adapter = load_adapter(config)
    with safe_open(output / LORA_FILE, "pt") as file:
        header = file.metadata()
    provenance = json.loads(header["clora.provenance"])
    del provenance["dtype"]
    provenance["inputs_sha256"] = inputs_digest(filled, read_inputs(filled, adapter.pipeline), config.dtype)
    header["clora.provenance"] = json.dumps(provenance)
    save_file(load_file(output / LORA_FILE), output / LORA_FILE, header)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("now", ["auto", "float32"])
def test_a_collection_that_lacks_the_dtype_counts(make_config, machine, capsys, dtype, now):
    machine("float32")
    config = make_config(dtype=dtype)
    output = distill(config)
    make_collection_earlier(output, config)
    (output / FINISHED).unlink()
    before = files_of(output)
    machine("bfloat16")
    distill(config.model_copy(update={"dtype": now}))
    assert "nothing is trained" in capsys.readouterr().err
    assert files_of(output) == before


def test_a_finished_run_of_before_counts_in_the_dtype_that_it_was_set_to(make_config, machine, capsys):
    machine("float32")
    config = make_config(dtype="bfloat16")
    output = distill(config)
    make_collection_earlier(output, config)

    def as_before(flat, values):
        del values["dtype"]
        return {**values, "config": {**values["config"], "dtype": "bfloat16"}}

    rewrite(output / FINISHED, as_before)
    before = files_of(output)
    distill(config.model_copy(update={"dtype": "auto"}))
    assert "nothing is trained" in capsys.readouterr().err
    assert files_of(output) == before


@pytest.mark.parametrize(("dtype", "there"), [("bfloat16", "float32"), ("auto", "bfloat16")])
def test_the_dtype_is_the_base_s_and_not_that_of_the_latents(
    z_image, machine, monkeypatch, tmp_path, capsys, dtype, there
):
    machine(there)
    config = z_image(train={"updates": 3, "checkpoint_every": 1}, dtype=dtype)
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
    assert load_values(newest(tmp_path / "out"))["dtype"] == "bfloat16"
    machine("float32")
    capsys.readouterr()
    distill(config)
    said = capsys.readouterr().err
    assert "resuming at update 2" in said
    assert said.count("several times slower") == 1
    assert read_collection(tmp_path / "out").provenance["dtype"] == "bfloat16"
    distill(config)
    assert "nothing is trained" in capsys.readouterr().err


def test_latents_may_have_a_dtype_that_no_base_has(adapter, monkeypatch, tmp_path):
    monkeypatch.setattr(type(adapter), "latent_dtype", torch.float16)
    with make_trainer(adapter) as trainer:
        trainer.save(tmp_path / "checkpoint.safetensors")
        trainer.load(tmp_path / "checkpoint.safetensors")
    assert load_values(tmp_path / "checkpoint.safetensors")["dtype"] == "float32"


def test_auto_is_the_dtype_only_of_a_run_that_would_go_on_or_is_finished(make_config, machine, tmp_path):
    machine("bfloat16")
    settings = {"dtype": "auto", "sampler": {"guidance": None}}  # the family's, which nobody knows yet
    output = distill(make_config(**settings))
    machine("float32")

    def taken(first=(), **changed):
        return with_run_dtype(make_config(first, **settings | changed), torch.device("cpu"))[0].dtype

    for changed in ({}, {"train": {"updates": 3}}, {"train": {"learning_rate": 1e-3}}):
        assert taken(**changed) == "bfloat16", changed
    others = (
        {"seed": 5},
        {"sampler": {"guidance": 2.0}},
        {"sampler": {"guidance": None, "teacher_guidance": 2.0}},
        {"train": {"updates": 1}},
        {"data": {"size": (32, 64)}},
        {"first": {"prompt": "make it another"}},
    )
    for changed in others:
        assert taken(**changed) == "float32", changed
    # Checkpoints of another run, and damaged ones, hide neither the finished run nor its collection alone.
    (output / CHECKPOINT).mkdir()
    for change in ({"dtype": "complex64"}, {"dtype": "float32", "config": {}}, {"config": None}, {"inputs": []}):
        shutil.copy(output / FINISHED, newest(output))
        rewrite(newest(output), lambda flat, values, change=change: {**values, **change})
        assert taken() == "bfloat16", change
    (output / FINISHED).unlink()
    assert taken() == "bfloat16"
    for changed in (*others, {"train": {"updates": 3}}):
        assert taken(**changed) == "float32", changed


def test_another_run_s_checkpoint_is_refused_by_what_differs(stopped, machine):
    config = stopped("auto", "bfloat16")
    machine("float32")
    with pytest.raises(CloraError, match="seed was 0, is 5"):
        distill(config.model_copy(update={"seed": 5}))


def test_bfloat16_on_a_cpu_that_does_not_multiply_in_it_is_named_slow(make_config, machine, capsys):
    cpu, config = torch.device("cpu"), make_config(dtype="bfloat16")
    machine("bfloat16")
    assert with_run_dtype(config, cpu)[1] == ""
    distill(config.model_copy(update={"dtype": "auto"}))
    assert "dtype: auto is bfloat16 here\n" in capsys.readouterr().err
    machine("float32")
    capsys.readouterr()
    slow = "mostly several times slower than float32 on a CPU that does not multiply in it, as PyTorch finds of this one; set float32"
    assert with_run_dtype(config, cpu)[1] == f"dtype: bfloat16 is {slow}"
    assert [note for note in make_plan(config)["notes"] if slow in note]
    inherited = with_run_dtype(config.model_copy(update={"dtype": "auto"}), cpu)[1]
    assert inherited.startswith("dtype: auto is bfloat16 here, as of the run that")
    assert inherited.endswith(f"{slow} and another output to begin anew")
    assert with_run_dtype(make_config(dtype="float32"), cpu)[1] == ""


def test_what_cannot_be_read_has_no_dtype(make_config, machine, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LORA_FILE).write_bytes(b"damaged")
    machine("bfloat16")
    distill(make_config(dtype="auto"))
    assert read_collection(tmp_path / "out").provenance["dtype"] == "bfloat16"


def test_a_plan_counts_the_dtype_that_the_run_takes(make_config, machine):
    config = make_config(dtype="auto")
    machine("bfloat16")
    new = make_plan(config)
    machine("float32")
    distill(config)
    machine("bfloat16")
    begun = make_plan(config)
    assert (new["model"]["dtype"], begun["model"]["dtype"]) == ("bfloat16", "float32")
    assert begun["memory"]["base"] == 2 * new["memory"]["base"]
    assert [note for note in begun["notes"] if note.startswith("dtype: auto is float32 here, as of the run that")]
    assert not [note for note in new["notes"] if "dtype" in note]
