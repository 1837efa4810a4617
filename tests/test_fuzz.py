"""Hostile files of users, other than LoRA weights (`tests/lora/test_fuzz.py`): only our own errors come out of reading them."""

from __future__ import annotations

import io
import json
import os
from functools import cache

import pytest
import torch
from helpers.collection_cases import describe
from helpers.hostile import JSON, YAML, as_json, as_yaml, damaged, edited, expect_own_errors, fuzz
from helpers.pictures import picture, write_images
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import clora
from clora.collection.card import model_card
from clora.collection.metadata import LORA_FILE, to_metadata
from clora.collection.write import write_collection
from clora.commands.checks import add_file_problems, find_file_problems
from clora.config.prompts_file import read_prompts
from clora.config.settings import DataConfig, general_instructions, load_config
from clora.data.images import load_image
from clora.errors import CloraError
from clora.lora.inspect import check_usable, inspect, render
from clora.lora.load import load_lora
from clora.lora.save import save_lora
from clora.models.skeleton import check_processors, skeleton
from clora.testing import random_lora, tiny_pipeline

CONFIG = {
    "pipeline": "base",
    "output": "out",
    "effects": [
        {"name": "snow fall", "lora": "a.safetensors", "prompt": "make it snow", "max_error": 0.01, "ignore": []},
        {"name": "comic", "lora": "peft", "prompt": "p", "trigger": "<c>", "student_prompts": ["<c> one"]},
    ],
    "data": {
        "sources": "photos",
        "size": [64, 96],
        "max_sequence_length": 40,
        "general_instructions": "lines.txt",
        "held_out": 1,
        "sources_per_effect": 2,
        "general_targets": 2,
        "general_pairs": 3,
        "cache": "cache",
    },
    "student": {"rank": 8, "init": "zero", "targets": ["to_q"]},
    "sampler": {"steps": 8, "shift": 3.0, "teacher_steps": 4, "guidance": 4.0, "teacher_guidance": 3.0},
    "objective": {
        "switch_probability": 0.5,
        "switch_every": 1,
        "norm_rescale": False,
        "weights": {"backward_simulation": 1.0, "target_simulation": 1.0, "trajectory_anchoring": 1.0},
    },
    "train": {
        "updates": 10,
        "anchor_share": 0.1,
        "critic_ratio": 5,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "warmup_updates": 1,
        "weight_decay": 0.1,
        "ema_decay": 0.9,
        "clip": 1.0,
        "gradient_rows": 2,
        "teacher_memory_gb": 1.0,
        "minutes": 1.0,
    },
    "prompts": {"file": "prompts.yaml", "writer": "templates", "paraphrases": 2},
    "seed": 0,
    "device": "cpu",
    "dtype": "auto",
}
SMALL = {key: CONFIG[key] for key in ("pipeline", "output", "effects", "data", "student", "train")}
PROMPTS = {
    "effects": [
        {
            "name": "snow fall",
            "trigger": "<s>",
            "student_prompts": ["<s> now"],
            "written_by": "x",
            "similarity": {"comic": 0.1},
        },
        {"name": "comic", "trigger": "<c>", "student_prompts": ["<c> two"]},
    ],
    "general_instructions": ["brighten it"],
}
LINES = b"brighten it\nmake it blue\n\nremove the cup\n"
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 2,
    "rank_pattern": {"to_q": 2},
    "alpha_pattern": {"attn.to_q": 4},
    "target_modules": ["to_q"],
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "bias": "none",
}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a.lora_A.weight": "a-1.safetensors"}}
PIPELINE = {
    "_class_name": "Flux2KleinPipeline",
    "_diffusers_version": "0.39.0",
    "_name_or_path": "x",
    "is_distilled": False,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


@pytest.fixture(scope="session")
def hostile(tmp_path_factory):
    """A folder with everything that `CONFIG` names, a pipeline, a collection, and what paths may lead to."""
    folder = tmp_path_factory.mktemp("hostile")
    write_images(folder / "photos", 3)
    (folder / "lines.txt").write_bytes(LINES)
    (folder / "prompts.yaml").write_bytes(as_yaml(PROMPTS))
    tiny_pipeline().save_pretrained(folder / "base")
    lora = random_lora(tiny_pipeline().transformer, 2, 0)
    save_lora(lora, folder / "a.safetensors")
    save_lora(lora, folder / "peft", "peft", alpha=2.0)
    save_lora(lora, folder / "shards" / "a-1.safetensors")
    write_collection(lora, describe(size=(64, 64)), folder / "collection", torch.float32)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    (folder / "elsewhere").mkdir()
    return folder


def check_config(data, folder):
    """As the commands read a config: the file, the prompts file, then everything that they name."""
    path = folder / "fuzz.yaml"
    path.write_bytes(data)
    try:
        config = load_config(path)
    except CloraError as error:
        raise add_file_problems(error, path, ()) from error
    json.dumps(config.recorded())
    find_file_problems(config).refuse()


def check_prompts(data, folder):
    (folder / "fuzzed.prompts.yaml").write_bytes(data)
    read_prompts(folder / "fuzzed.prompts.yaml")
    (folder / "small.yaml").write_bytes(as_yaml(SMALL | {"prompts": {"file": "fuzzed.prompts.yaml"}}))
    load_config(folder / "small.yaml")


def check_instructions(data, folder):
    (folder / "fuzzed.txt").write_bytes(data)
    data = DataConfig(sources="photos", size=(16, 16), general_instructions=str(folder / "fuzzed.txt"))
    general_instructions(data)


def check_picture(data, folder):
    (folder / "picture").write_bytes(data)
    load_image(folder / "picture", (16, 16))


def check_lora(path):
    transformer = tiny_transformer()
    info = inspect(path)
    json.dumps(info)
    render(info)
    check_usable(info)
    load_lora(path, transformer)


def check_adapter_config(data, folder):
    (folder / "peft" / "adapter_config.json").write_bytes(data)
    check_lora(folder / "peft")


def check_index(data, folder):
    (folder / "shards" / "a.safetensors.index.json").write_bytes(data)
    check_lora(folder / "shards" / "a.safetensors.index.json")


def check_collection(metadata, folder):
    """Loads and applies a collection of this metadata; a pipeline that refuses it keeps its scheduler and has no LoRA."""
    pipeline, scheduler = tiny_pipeline_of_the_process(), tiny_pipeline_of_the_process().scheduler
    path = folder / "fuzzed.safetensors"
    save_file(load_file(folder / "collection" / LORA_FILE), path, metadata)
    model_card(clora.load_collection(path).collection)
    try:
        clora.apply(pipeline, path)
    except CloraError:
        assert pipeline.scheduler is scheduler
        assert not getattr(pipeline.transformer, "peft_config", None)
        raise
    finally:
        pipeline.unload_lora_weights()
        pipeline.scheduler = scheduler


def check_pipeline(data, folder):
    (folder / "base" / "model_index.json").write_bytes(data)
    check_processors(str(folder / "base"))
    skeleton(str(folder / "base"), torch.float32)


tiny_pipeline_of_the_process = cache(tiny_pipeline)


@cache
def tiny_transformer():
    return tiny_pipeline().transformer


def pictures():
    """A small picture in each format, with damaged bytes."""
    found = []
    for name in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        picture(0, (20, 24)).save(buffer, name)
        found.append(buffer.getvalue())
    return st.sampled_from(found).flatmap(damaged)


def texts(tree, write, raw):
    """A tree with odd values, and its text with damaged bytes."""
    return st.one_of(edited(tree, raw).map(write), edited(tree, raw).map(write), damaged(write(tree)))


@st.composite
def metadata(draw):
    """A collection's metadata with odd values in its JSON, or with damaged text."""
    entries = to_metadata(describe(size=(64, 64), provenance={"seed": 0}, metrics={"a": 1.0, "b": {"c": 2.0}}))
    adapter = {f"transformer.{key}": value for key, value in ADAPTER.items()}
    for key in draw(
        st.lists(st.sampled_from([*entries, "lora_adapter_metadata"]), min_size=1, max_size=3, unique=True)
    ):
        text = entries.get(key, json.dumps(adapter))
        is_json = text[0] in "[{"
        changed = draw(texts(json.loads(text), as_json, JSON) if is_json else damaged(text.encode()))
        entries[key] = changed.decode("utf-8", "replace")
    return entries


CASES = {
    "config": (check_config, texts(CONFIG, as_yaml, YAML), 330),
    "prompts": (check_prompts, texts(PROMPTS, as_yaml, YAML), 100),
    "instructions": (check_instructions, damaged(LINES), 100),
    "pictures": (check_picture, pictures(), 200),
    "adapter_config": (check_adapter_config, texts(ADAPTER, as_json, JSON), 100),
    "index": (check_index, texts(INDEX, as_json, JSON), 100),
    "collection": (check_collection, metadata(), 30),
    "model_index": (check_pipeline, texts(PIPELINE, as_json, JSON), 40),
}


def fuzz_kind(kind, folder, times, derandomize):
    check, cases, count = CASES[kind]
    fuzz(cases, lambda case: expect_own_errors(lambda: check(case, folder)), times * count, derandomize)


@pytest.mark.parametrize("kind", CASES)
def test_only_our_errors_come_out(kind, hostile, monkeypatch):
    monkeypatch.chdir(hostile / "elsewhere")
    fuzz_kind(kind, hostile, 1, True)


@pytest.mark.soak
@pytest.mark.parametrize("kind", CASES)
def test_only_our_errors_come_out_of_many_files(kind, hostile, monkeypatch):
    monkeypatch.chdir(hostile / "elsewhere")
    fuzz_kind(kind, hostile, 10, False)
