"""Input that cannot be used is refused before anything is rendered, and leaves no collection."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from helpers.pictures import write_images
from safetensors.torch import load_file, save_file

from clora import ops
from clora.commands.checks import find_file_problems
from clora.commands.distill import distill
from clora.data import rendering as targets_module
from clora.errors import CloraError
from clora.lora.save import save_lora
from clora.lora.state import LoRAModule
from clora.testing import random_lora, tiny_pipeline


def wrong_architecture(tmp_path):
    other = dataclasses.replace(random_lora(tiny_pipeline().transformer, 2, 0))
    modules = {f"other_blocks.{i}.proj": m for i, m in enumerate(other.modules.values())}
    path = tmp_path / "other.safetensors"
    save_lora(dataclasses.replace(other, modules=modules), path)
    return {"first": {"lora": str(path)}}


def changes_nothing(tmp_path):
    path = tmp_path / "zero.safetensors"
    lora = random_lora(tiny_pipeline().transformer, 2, 0)
    modules = {name: LoRAModule(m.lora_A, torch.zeros_like(m.lora_B)) for name, m in lora.modules.items()}
    save_lora(dataclasses.replace(lora, modules=modules), path)
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


def pickled_beside_a_decoy(tmp_path):
    """Any file of safetensors made diffusers look no further, and open the pickle."""
    changes = pickled_vae(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "pickled" / "vae" / "decoy.safetensors")
    return changes


def code_of_another_library(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(index.read_text().replace('"transformers"', '"antigravity"'))
    return {"pipeline": str(tmp_path / "other")}


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
    "changes_nothing": (changes_nothing, r"zero\.safetensors: the LoRA changes nothing"),
    "ignored_key_that_no_lora_has": (
        lambda tmp: {"first": {"ignore": ("lora_te",)}},
        "no tensor's name begins with 'lora_te'",
    ),
    "distilled_klein": (distilled_klein, "is_distilled"),
    "no_pipeline_there": (
        lambda tmp: {"pipeline": str(tmp / "nothing")},
        "no such folder; expected a pipeline.s folder",
    ),
    "unknown_pipeline_class": (unknown_class, "newer diffusers"),
    "not_a_pipeline": (not_a_pipeline, "expected a folder as save_pretrained writes it"),
    "damaged_tokenizer": (damaged_tokenizer, "cannot be loaded"),
    "vae_without_some_weights": (vae_without_some_weights, "cannot be loaded"),
    "pickled_beside_a_decoy": (pickled_beside_a_decoy, "cannot be loaded: .*no file named .*safetensors"),
    "code_of_another_library": (
        code_of_another_library,
        r"expected a class of diffusers or transformers, found \['antigravity'.*never imported",
    ),
    "pickled_vae": (pickled_vae, r"diffusion_pytorch_model\.bin is a pickle.*save_pretrained"),
    "size": (lambda tmp: {"data": {"size": (18, 16)}}, "multiples of 4"),
    "overlong_prompt": (lambda tmp: {"first": {"prompt": "snow " * 60}}, "at most 40 tokens"),
    "overlong_student_prompt": (lambda tmp: {"first": {"student_prompts": ("snow " * 60,)}}, "at most 40 tokens"),
    "empty_images": (empty_images, "holds no images"),
    "all_held_out": (lambda tmp: {"data": {"held_out": 6}}, "held_out = 6 leaves none of the 4"),
    "unequal_names": (unequal_names, "one image of each name.*'2', 'two'"),
    "too_few_steps": (lambda tmp: {"sampler": {"steps": 1}}, "at least 2 sampler.steps, found 1"),
    "no_such_device": (lambda tmp: {"device": "cuda:77"}, "CUDA devices"),
    "output_is_a_file": (output_is_a_file, "is a file"),
    "output_is_the_pipeline": (
        lambda tmp: {"pipeline": str(tmp), "output": f"{tmp}/out/.."},
        "output: .* found that of pipeline",
    ),
    "cache_is_a_file": (cache_is_a_file, "file is a file"),
    "unknown_target": (lambda tmp: {"student": {"targets": ("to_qq",)}}, "to_qq"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_leaves_no_collection(make_config, tmp_path, monkeypatch, case):
    make_bad, message = BAD[case]
    monkeypatch.setattr(targets_module, "render_targets", None)  # which takes hours: mistakes are reported before
    with pytest.raises(CloraError, match=message):
        distill(make_config(**make_bad(tmp_path)))
    out = tmp_path / "out"
    assert not out.exists(), "not even an empty folder"


def test_a_collection_is_not_written_among_the_pictures(make_config, images):
    with pytest.raises(
        CloraError, match=r"output: expected a folder of its own, found that of data\.sources, .*; name"
    ):
        distill(make_config(output=str(images)))
    assert {file.suffix for file in images.iterdir()} == {".png"}


@pytest.mark.parametrize("config", ["studio.yaml", {"pipeline": "base"}, None])
def test_what_is_no_config_is_refused(config):
    found = type(config).__name__
    with pytest.raises(CloraError, match=rf"expected a DistillConfig, found {found}; load it with clora\.load_config"):
        distill(config)


def test_a_readme_of_someone_elses_is_not_overwritten(make_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my project")
    with pytest.raises(CloraError, match=r"another README\.md"):
        distill(make_config())
    assert (tmp_path / "out" / "README.md").read_text() == "my project"


@pytest.fixture
def no_kernels(monkeypatch):
    """Triton's kernels cannot run, not even interpreted."""
    ops._obstacle.cache_clear()
    monkeypatch.setattr(ops, "interpreting", lambda: False)
    yield
    ops._obstacle.cache_clear()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "CLORA_DESIGN",
            "merge",
            "CLORA_DESIGN=merge: expected one of auto, merged, fused, split; did you mean 'merged'?",
        ),
        ("CLORA_BACKEND", "cuda", "CLORA_BACKEND=cuda: expected one of auto, triton, eager"),
        ("CLORA_BACKEND", "triton", "CLORA_BACKEND=triton, but multi_lora_linear cannot run on Triton"),
        ("CLORA_DESIGN", "fused", "which do not run here; use split or auto"),
    ],
)
def test_a_wrong_variable_is_refused_before_anything_is_loaded(
    make_config, monkeypatch, no_kernels, variable, value, message
):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr("clora.commands.distill.load_adapter", lambda config: pytest.fail("loaded"))
    config = make_config()
    with pytest.raises(CloraError) as error:
        distill(config)
    assert message in str(error.value)
    assert message in " ".join(find_file_problems(config))


def test_cuda_graphs_without_a_gpu_are_among_the_problems_of_a_plan(make_config):
    config = make_config(train={"updates": 1, "cuda_graphs": True})
    (problem,) = find_file_problems(config)
    assert problem == "train.cuda_graphs: expected an NVIDIA GPU, found cpu; switch it off"
