"""The whole job on the user's own files."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.pictures import write_images
from safetensors.torch import load_file, save_file

from clora.collection.write import LORA_FILE
from clora.commands import distill as engine
from clora.commands.distill import CHECKPOINT, distill
from clora.data import images as images_module
from clora.data import rendering as targets_module
from clora.data.prepare import encode_data
from clora.errors import CloraError
from clora.hashing import file_digest
from clora.lora.algebra import factorise
from clora.lora.layers import linear_shapes
from clora.lora.load import load_lora, read_lora
from clora.lora.source import find_weights
from clora.lora.state import LoRAState
from clora.models import loading
from clora.studio import assets
from clora.testing import SIZE, tiny_config, tiny_pipeline

EFFECTS = ("blueprint", "snow")
WATCHED = ("history.jsonl", "previews", "report.html")


def test_cuda_graphs_without_a_gpu_are_refused_before_anything_is_encoded(make_config, monkeypatch):
    monkeypatch.setattr(engine, "encode_data", None)
    with pytest.raises(CloraError, match="cuda_graphs: expected an NVIDIA GPU, found cpu"):
        distill(make_config(train={"cuda_graphs": True}))


def test_two_files_become_one_collection(make_config, loras, tiny_folder, tmp_path):
    config = make_config(train={"preview_every": "auto"})
    folder = distill(config)
    assert folder == tmp_path / "out"
    assert {"README.md", LORA_FILE, "samples.png", "scheduler", *WATCHED} == {
        p.name for p in folder.iterdir() if not p.name.startswith(".")
    }
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
        assert stated[name]["teacher_sha256"] == file_digest(find_weights(lora))
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
def test_the_base_is_called_as_its_folder_states(tiny_folder, adapter, tmp_path, monkeypatch, stated, expected):
    (tmp_path / "base").mkdir()
    (tmp_path / "tests" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    index = json.loads((tiny_folder / "model_index.json").read_text("utf-8")) | {"_name_or_path": stated}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index), "utf-8")
    assert engine._name_of_base(adapter.pipeline, tmp_path / "base") == expected


def test_given_targets_are_used(make_config, monkeypatch, tmp_path):
    sources, targets = write_images(tmp_path / "before", 3, 1), write_images(tmp_path / "after", 3, 2)
    seen = {}

    def train(config, used, teachers, data, report, *rest):
        seen.update(data=data, adapter=used)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_student", train)
    with pytest.raises(KeyboardInterrupt):
        distill(make_config({"sources": str(sources), "targets": str(targets)}))
    data = seen["data"]
    from clora.data.images import load_images

    for stacked, folder in ((data.sources, sources), (data.targets, targets)):
        expected = seen["adapter"].encode_images(load_images(folder, SIZE))
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
    assert len({file for file in read if file.parent == own}) == data.sources.shape[1] == 2


def test_given_targets_are_not_rendered_and_general_ones_are(make_config, monkeypatch, tmp_path):
    sources, targets = write_images(tmp_path / "before", 3, 1), write_images(tmp_path / "after", 3, 2)
    seen = {}
    render = targets_module.render_targets

    def rendered(adapter, teachers, *rest):
        seen.setdefault("names", []).append(list(teachers))
        return render(adapter, teachers, *rest)

    def train(config, used, teachers, data, report, checkpoints, *rest):
        seen.update(data=data, checkpoints=checkpoints)
        raise KeyboardInterrupt

    monkeypatch.setattr(targets_module, "render_targets", rendered)
    monkeypatch.setattr(engine, "train_student", train)
    with pytest.raises(KeyboardInterrupt):
        distill(make_config({"sources": str(sources), "targets": str(targets)}, data={"general_targets": 3}))
    assert seen["names"] == [[EFFECTS[1]], []], "the teacher without given targets, then the base"
    assert len(seen["data"].general_targets) == 3
    assert seen["data"].general_targets[:].std(0).any(), "each pair has its own render"
    assert seen["checkpoints"].folder == tmp_path / "out" / CHECKPOINT


def test_a_teachers_licence_reaches_the_collection(make_config, loras, tmp_path):
    licensed = tmp_path / "licensed.safetensors"
    save_file(load_file(loras["blueprint"]), licensed, {"format": "pt", "modelspec.license": "CC-BY-4.0"})
    folder = distill(make_config({"lora": str(licensed)}))
    assert "CC-BY-4.0" in (folder / "README.md").read_text("utf-8")


def test_a_device_that_is_not_there(monkeypatch, tiny_folder):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(CloraError, match="no Apple GPU"):
        loading.load_pipeline(str(tiny_folder), "mps")


def test_a_pipeline_saved_in_bfloat16_runs_in_one_type(tmp_path):
    """transformers keeps the type of a text encoder's file, diffusers makes the rest fp32."""
    pipeline = tiny_pipeline()
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    loaded = loading.load_pipeline(str(tmp_path), "cpu")
    assert loaded.text_encoder.dtype == loaded.transformer.dtype == torch.float32
    assert loaded.encode_prompt("a red circle", max_sequence_length=40)[0].dtype == torch.float32


def test_a_teacher_that_is_not_exact_is_reported(monkeypatch, capsys):
    """A full change of a layer may be taken as factors of a lower rank, as far as its effect allows."""
    transformer = tiny_pipeline().transformer
    module = "transformer_blocks.0.attn.to_q"
    delta = torch.randn(linear_shapes(transformer)[module], generator=torch.Generator().manual_seed(0))

    def load(path, transformer, max_error, ignore):
        factors, error = factorise(delta, max_rank=16, max_error=max_error)
        assert error <= max_error, "as load_lora checks"
        return LoRAState({module: factors}, errors={module: error})

    monkeypatch.setattr(loading, "load_lora", load)
    effect = tiny_config([{"name": "full", "lora": "full", "prompt": "p", "max_error": 0.7}]).effects[0]
    state = loading.load_teacher(effect, transformer)
    error = float((state.modules[module].delta() - delta).norm() / delta.norm())
    assert 0.1 < error <= 0.7
    assert (
        f"effect full: 1 layers without low rank became factors, error {error:.2%} at most" in capsys.readouterr().err
    )


def test_a_collection_of_the_studio_names_it_as_the_demos_does():
    assert engine._name_of_base(None, assets.pipeline_folder()) == assets.BASE_MODEL
