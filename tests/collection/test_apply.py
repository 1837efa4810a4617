"""Using a collection: the arguments of its calls, and the weights that ``clora.apply`` loads into a stock pipeline."""

from __future__ import annotations

import copy
import inspect
import json

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers.collection_cases import describe, effect
from helpers.families import FAMILIES, bare_pipeline, run
from safetensors.torch import load_file, save_file

import clora
from clora.collection.apply import call_arguments
from clora.collection.metadata import LORA_FILE, from_metadata, read_collection, to_metadata
from clora.collection.write import write_collection
from clora.errors import CloraError
from clora.flow.matching import student_schedule
from clora.lora.convert import convert_lora
from clora.lora.families import FLUX2
from clora.lora.save import save_lora
from clora.testing import merge_lora, random_lora, tiny_pipeline

SNOW, MOEBIUS = effect("snow", ("<snow> let it snow.",)), effect("moebius", ("<moebius> thin ink lines", "as a comic"))
CALLS = {
    "Flux2KleinPipeline": {"guidance_scale": 1.0},
    "Flux2Pipeline": {"guidance_scale": 4.0},
    "QwenImageEditPlusPipeline": {"true_cfg_scale": 1.0},
    "QwenImageEditPipeline": {"true_cfg_scale": 1.0},
    "FluxKontextPipeline": {"guidance_scale": 2.5, "max_area": 64 * 72},
}


@pytest.fixture
def collection(tmp_path):
    """Returns write(family): a collection of random weights for it, and its LoRA."""

    def write(family, **values):
        student = random_lora(bare_pipeline(family).transformer, 4, 7)
        described = describe(SNOW, MOEBIUS, pipeline=family, **({"call": CALLS[family]} | values))
        return write_collection(student, described, tmp_path / family, torch.float32), student

    return write


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_loads_the_merged_delta_and_the_scheduler(collection, family):
    folder, student = collection(family)
    pipeline = bare_pipeline(family)
    before = run(family, pipeline.transformer)
    merged = run(family, merge_lora(pipeline.transformer, student))
    assert (merged - before).abs().max() > 0.01, "the LoRA changes nothing, so this test shows nothing"
    effects = clora.apply(pipeline, folder)
    torch.testing.assert_close(run(family, pipeline.transformer), merged, rtol=0, atol=1e-5)
    assert list(effects) == ["snow", "moebius"]
    pipeline.scheduler.set_timesteps(sigmas=[1 - k / 8 for k in range(8)], mu=0.7)
    torch.testing.assert_close(pipeline.scheduler.timesteps / 1000, student_schedule(8), rtol=0, atol=1e-6)
    assert pipeline.scheduler.config.stochastic_sampling


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("path", ["folder", "file"])
def test_stock_load_lora_weights_is_the_same(collection, family, path):
    folder, student = collection(family)
    pipeline = bare_pipeline(family)
    merged = run(family, merge_lora(pipeline.transformer, student))
    pipeline.load_lora_weights(str(folder if path == "folder" else folder / LORA_FILE))
    torch.testing.assert_close(run(family, pipeline.transformer), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", CALLS)
def test_an_effect_is_a_call_of_its_pipeline(family):
    effects = clora.Effects(describe(SNOW, MOEBIUS, pipeline=family, call=CALLS[family]))
    assert effects["moebius"] == {
        "prompt": "<moebius> thin ink lines",
        "num_inference_steps": 8,
        "max_sequence_length": 40,
        "height": 64,
        "width": 72,
        **CALLS[family],
    }
    inspect.signature(getattr(diffusers, family).__call__).bind(None, image=None, **effects["moebius"])


@pytest.mark.skipif(not hasattr(diffusers, "QwenImage21Pipeline"), reason="this diffusers has no QwenImage21Pipeline")
def test_a_pipeline_without_a_text_length_is_not_given_one():
    arguments = call_arguments(describe(pipeline="QwenImage21Pipeline", call={"true_cfg_scale": 1.0}))
    assert arguments == {"num_inference_steps": 8, "true_cfg_scale": 1.0, "height": 64, "width": 72}


def test_two_effects_in_one_prompt():
    effects = clora.Effects(describe(SNOW, MOEBIUS), num_tokens=lambda prompt: 40)
    composed = effects.compose("snow", "moebius")
    sentence = "Please apply <snow> let it snow to the input image, and then apply <moebius> thin ink lines."
    assert composed.pop("prompt") == sentence
    single = effects["snow"]
    single.pop("prompt")
    assert composed == single


def test_two_effects_that_do_not_fit_one_prompt(collection):
    effects = clora.Effects(describe(SNOW, MOEBIUS), num_tokens=lambda prompt: 41)
    with pytest.raises(CloraError, match=r"at most 40 tokens, found 41 for 'snow' and 'moebius'.*two calls in a row"):
        effects.compose("snow", "moebius")
    with pytest.raises(CloraError, match=r"expected the effects that clora.apply\(pipe, path\) returns"):
        clora.Effects(describe(SNOW, MOEBIUS)).compose("snow", "moebius")


def test_the_pipelines_tokenizer_counts_a_composed_prompt(tmp_path):
    pipeline = tiny_pipeline()
    about = describe(SNOW, MOEBIUS, pipeline="Flux2KleinPipeline")
    folder = write_collection(random_lora(pipeline.transformer, 2, 0), about, tmp_path / "c", torch.float32)
    effects = clora.apply(pipeline, folder)
    with pytest.raises(CloraError, match=r"at most 40 tokens, found \d\d"):
        effects.compose("snow", "moebius")


def test_unknown_effects_and_pipelines():
    effects = clora.Effects(describe(SNOW, MOEBIUS))
    with pytest.raises(CloraError, match=r"unknown effect 'moebus'; .* has snow, moebius; did you mean 'moebius'\?$"):
        effects["moebus"]
    with pytest.raises(CloraError, match="unknown effect 'rain'"):
        effects.compose("snow", "rain")
    assert ("snow" in effects, "rain" in effects, len(effects)) == (True, False, 2)
    with pytest.raises(CloraError, match="has no SoonPipeline"):
        clora.Effects(describe(pipeline="SoonPipeline"))["a"]


def test_apply_refuses_another_pipeline(collection):
    folder, _ = collection("Flux2KleinPipeline")
    pipeline = bare_pipeline("FluxKontextPipeline")
    scheduler = pipeline.scheduler
    with pytest.raises(CloraError, match="is for Flux2KleinPipeline .some/pipeline., found FluxKontextPipeline"):
        clora.apply(pipeline, folder)
    assert pipeline.scheduler is scheduler


def rewritten(folder, change):
    """The collection's file with other tensors."""
    tensors = load_file(folder / LORA_FILE)
    change(tensors)
    save_file(tensors, folder / LORA_FILE, to_metadata(read_collection(folder)))


def widen(tensors):
    key = next(key for key in tensors if key.endswith("to_q.lora_A.weight"))
    tensors[key] = torch.ones(4, 1 + tensors[key].shape[1])


def add_unknown(tensors):
    tensors["transformer.nothing.lora_A.weight"] = torch.ones(4, 8)
    tensors["transformer.nothing.lora_B.weight"] = torch.ones(8, 4)


def drop_the_prefix(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("transformer.")] = tensors.pop(key)


@pytest.mark.parametrize("change", [widen, add_unknown, drop_the_prefix])
@pytest.mark.parametrize("family", ["Flux2KleinPipeline", "QwenImageEditPlusPipeline"])
def test_apply_takes_all_of_a_file_or_nothing(collection, family, change):
    folder, _ = collection(family)
    rewritten(folder, change)
    pipeline = bare_pipeline(family)
    before, scheduler = run(family, pipeline.transformer), pipeline.scheduler
    with pytest.raises(CloraError, match="expected some/pipeline"):
        clora.apply(pipeline, folder)
    assert torch.equal(run(family, pipeline.transformer), before)
    assert pipeline.scheduler is scheduler


def spoil(tensors):
    next(iter(tensors.values()))[0, 0] = torch.nan


def blow_up(tensors):
    next(iter(tensors.values()))[0, 0] = 1e30


SPOILT = {
    "nan": (spoil, {}, "not finite|NaN"),
    "an absurd weight": (blow_up, {}, r"values up to 1.0e\+30; expected at most 1e\+06"),
    "an absurd alpha": (None, {"alpha": 1e30}, "1e.30"),
    "an alpha of its own": (None, {"alpha": 8}, "taken 0 of"),
    "steps of the caller": (None, {"sampling": {"call": {"num_inference_steps": 80}}}, "states num_inference_steps=80"),
    "many pictures": (
        None,
        {"sampling": {"call": {"num_images_per_prompt": 10**6}}},
        "states num_images_per_prompt=10",
    ),
    "an argument of no call": (None, {"sampling": {"call": {"guidance": 1.0}}}, "states guidance=1.0"),
    "a flag": (None, {"sampling": {"call": {"return_dict": 0}}}, "states return_dict=0"),
    "a prompt": (None, {"sampling": {"call": {"prompt": 1}}}, "states prompt=1"),
    "absurd guidance": (None, {"sampling": {"call": {"guidance_scale": 1e30}}}, r"states guidance_scale=1e\+30"),
    "negative guidance": (None, {"sampling": {"call": {"guidance_scale": -1}}}, "states guidance_scale=-1"),
    "no shift": (None, {"scheduler": {"shift": "much"}}, "the scheduler of its metadata cannot be used"),
    "no noise levels": (None, {"scheduler": {"shift": 1e999}}, "metadata is damaged|cannot be used"),
    "steps without end": (None, {"sampling": {"steps": 10**9}}, "metadata is damaged"),
    "digits without end": (None, {"sampling": {"steps": "9" * 5000}}, "metadata is damaged"),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("case", SPOILT)
def test_a_refused_collection_leaves_the_pipeline_as_it_was(collection, tmp_path, case, loaded):
    change, values, message = copy.deepcopy(SPOILT[case])
    folder, _ = collection("Flux2KleinPipeline")
    pipeline = bare_pipeline("Flux2KleinPipeline")
    if loaded:
        other = random_lora(pipeline.transformer, 3, 1)
        clora.apply(
            pipeline,
            write_collection(other, describe(SNOW, pipeline="Flux2KleinPipeline"), tmp_path / "b", torch.float32),
        )
    before, scheduler = run("Flux2KleinPipeline", pipeline.transformer), pipeline.scheduler
    layers = dict(pipeline.transformer.named_modules())
    metadata = to_metadata(read_collection(folder))
    if "alpha" in values:
        adapter = {
            "transformer.r": 4,
            "transformer.lora_alpha": values.pop("alpha"),
            "transformer.target_modules": ["to_q"],
            "transformer.rank_pattern": {},
            "transformer.alpha_pattern": {},
        }
        metadata["lora_adapter_metadata"] = json.dumps(adapter)
    for section, found in values.items():
        text = json.dumps(json.loads(metadata[f"clora.{section}"]) | found)
        metadata[f"clora.{section}"] = text.replace(f'"{"9" * 5000}"', "9" * 5000)
    tensors = load_file(folder / LORA_FILE)
    if change:
        change(tensors)
    save_file(tensors, folder / LORA_FILE, metadata)
    with pytest.raises(CloraError, match=message):
        clora.apply(pipeline, folder)
    assert torch.equal(run("Flux2KleinPipeline", pipeline.transformer), before)
    assert pipeline.scheduler is scheduler
    after = dict(pipeline.transformer.named_modules())
    assert list(after) == list(layers)
    assert all(after[name] is layers[name] for name in after)


def test_an_error_of_diffusers_itself_leaves_the_pipeline_as_it_was(collection, tmp_path, monkeypatch):
    folder, _ = collection("Flux2KleinPipeline")
    pipeline = bare_pipeline("Flux2KleinPipeline")
    before, names = run("Flux2KleinPipeline", pipeline.transformer), list(dict(pipeline.transformer.named_modules()))
    load = pipeline.load_lora_weights
    monkeypatch.setattr(pipeline, "load_lora_weights", lambda *a, **k: (load(*a, **k), 1 / 0))
    with pytest.raises(CloraError, match="could not be loaded; the pipeline is as it was: division by zero"):
        clora.apply(pipeline, folder)
    assert torch.equal(run("Flux2KleinPipeline", pipeline.transformer), before)
    assert list(dict(pipeline.transformer.named_modules())) == names


def test_one_collection_after_the_other(collection, tmp_path):
    """Applying one again switches to it without loading."""
    first, student = collection("Flux2KleinPipeline")
    pipeline = bare_pipeline("Flux2KleinPipeline")
    plain = copy.deepcopy(pipeline.transformer)
    other = random_lora(plain, 3, 1)
    described = describe(MOEBIUS, pipeline="Flux2KleinPipeline", shift=1.5)
    second = write_collection(other, described, tmp_path / "second", torch.float32)
    expected = {first: student, second: other}
    for folder in (first, second, first, second):
        effects = clora.apply(pipeline, folder)
        merged = run("Flux2KleinPipeline", merge_lora(plain, expected[folder]))
        torch.testing.assert_close(run("Flux2KleinPipeline", pipeline.transformer), merged, rtol=0, atol=1e-5)
        assert pipeline.scheduler.config.shift == effects.collection.scheduler["shift"]
    assert len(pipeline.transformer.peft_config) == 2
    pipeline.unload_lora_weights()
    assert torch.equal(run("Flux2KleinPipeline", pipeline.transformer), run("Flux2KleinPipeline", plain))


@pytest.mark.parametrize("format", ["kohya", "comfyui", "peft"])
def test_apply_takes_only_diffusers_format(collection, tmp_path, format):
    folder, _ = collection("Flux2KleinPipeline")
    exported = tmp_path / ("peft" if format == "peft" else f"{format}.safetensors")
    convert_lora(folder, exported, format)
    pipeline = bare_pipeline("Flux2KleinPipeline")
    expected = f"has the {format} format; expected some/pipeline's LoRA in diffusers' format .*--format diffusers"
    with pytest.raises(CloraError, match=expected):
        clora.apply(pipeline, exported)
    assert not hasattr(pipeline.transformer, "peft_config")


def test_a_lora_that_is_no_collection(tmp_path):
    state = random_lora(bare_pipeline("Flux2KleinPipeline").transformer, 2, 0)
    save_lora(state, tmp_path / "a.safetensors", "comfyui", family=FLUX2)
    with pytest.raises(CloraError, match="not a clora collection"):
        clora.load_collection(tmp_path / "a.safetensors")
    with pytest.raises(CloraError, match="does not exist"):
        clora.load_collection(tmp_path / "missing" / "x")
    with pytest.raises(CloraError, match=r"nowhere-xyz does not exist; expected .* its hub id \(owner/name\)"):
        clora.load_collection("nowhere-xyz")


def test_metadata_is_read_back():
    described = describe(
        effect("snow", ("a", 'quote " and \\ and \n', "雪"), trigger="<snow>", license="mit"),
        base_revision="abc",
        metrics={"accuracy": 0.1 + 0.2, "CLIP": {"snow": 1 / 3}},
        provenance={"student": {"targets": None, "rank": 8}, "list": [1, 2.5, "x"]},
    )
    metadata = to_metadata(described)
    assert set(map(type, metadata.values())) == {str}
    assert from_metadata(metadata, "f") == described
    assert from_metadata(metadata | {"clora.later": "?", "format": "pt"}, "f") == described


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clora.effects", "[]"),
        ("clora.effects", "{"),
        ("clora.effects", '[{"name": "a"}]'),
        ("clora.sampling", '{"steps": 0, "shift": 3.0, "size": [1, 1], "max_sequence_length": 4}'),
        ("clora.scheduler", "[" * 100_000),
    ],
)
def test_damaged_metadata(key, value):
    metadata = to_metadata(describe())
    with pytest.raises(CloraError, match="f: the collection's metadata is damaged"):
        from_metadata(metadata | {key: value}, "f")
    del metadata["clora.pipeline"]
    with pytest.raises(CloraError, match="damaged"):
        from_metadata(metadata, "f")


def test_what_would_not_be_read_back_is_not_written():
    with pytest.raises(CloraError, match="would not be read back"):
        to_metadata(describe(provenance={"loss": float("nan")}))


def test_a_hub_id_is_downloaded(collection, monkeypatch, tmp_path):
    folder, _ = collection("Flux2KleinPipeline")
    asked = []

    def download(repo_id, filename):
        asked.append((repo_id, filename))
        return str(folder / LORA_FILE)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    assert list(clora.load_collection("me/collection")) == ["snow", "moebius"]
    assert asked == [("me/collection", LORA_FILE)]
    (tmp_path / "me" / "here").mkdir(parents=True)
    with pytest.raises(CloraError, match="holds no .safetensors file"):
        clora.load_collection("me/here")
    assert len(asked) == 1, "a local file is never asked for"

    def offline(repo_id, filename):
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(CloraError, match="'me/other' is not a local file or folder, .*no connection"):
        clora.load_collection("me/other")


def test_the_scheduler_in_the_metadata_is_the_folders(collection):
    folder, _ = collection("Flux2KleinPipeline", shift=2.0)
    saved = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    assert json.loads(saved.to_json_string()) == read_collection(folder).scheduler
    assert saved.config.shift == 2.0
