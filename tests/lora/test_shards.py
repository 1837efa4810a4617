"""A LoRA in several files with an index is read whole; a part of it never is."""

from __future__ import annotations

import json
import pickle

import pytest
from helpers.lora_cases import assert_changes
from safetensors.torch import load_file, save_file

from clora.errors import CloraError
from clora.lora.inspect import inspect
from clora.lora.load import read_lora
from clora.lora.save import save_lora
from clora.lora.source import weights_digest

SHARDS = ("adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors")
INDEX = "adapter_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, random_state):
    """PEFT's folder in two shards, a pair of matrices cut between them."""
    save_lora(random_state(), tmp_path, "peft", alpha=2)
    whole = tmp_path / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    keys = sorted(tensors)
    parts = {SHARDS[0]: keys[:7], SHARDS[1]: keys[7:]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_the_folder_and_the_index_are_the_whole(folder, shapes, random_state):
    expected = {name: m.lora_B.double() @ m.lora_A.double() for name, m in random_state().modules.items()}
    for path in (folder, folder / INDEX):
        assert_changes(read_lora(path, shapes), expected)
    info = inspect(folder)
    assert not info["problems"]
    assert info["bytes"] == sum((folder / name).stat().st_size for name in SHARDS)


def test_the_digest_is_that_of_the_contents(folder):
    before = weights_digest(folder)
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[1]).write_bytes(data)
    assert weights_digest(folder) != before


def test_one_shard_is_refused(folder, shapes):
    with pytest.raises(CloraError, match="one shard of a LoRA, with adapter_model-00002.*name the folder or the index"):
        read_lora(folder / SHARDS[0], shapes)
    (folder / INDEX).unlink()
    with pytest.raises(CloraError, match="shard 1 of 2 of a LoRA, and no index"):
        read_lora(folder / SHARDS[0], shapes)


def test_a_missing_shard(folder, shapes):
    (folder / SHARDS[1]).unlink()
    with pytest.raises(CloraError, match="00002"):
        read_lora(folder, shapes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index["weight_map"].popitem(), "disagree about 1 tensor"),
        (lambda index: index["weight_map"].update(more=SHARDS[0]), "for example more"),
        (lambda index: index["weight_map"].update(more="../a.safetensors"), "files beside it"),
        (lambda index: index["weight_map"].update(more="a.bin"), "files beside it"),
        (lambda index: index["weight_map"].update(more=3), "files beside it"),
        (lambda index: index["weight_map"].clear(), "empty"),
        (lambda index: index.clear(), "weight_map"),
    ],
)
def test_an_index_that_does_not_fit(folder, shapes, change, words):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CloraError, match=words):
        read_lora(folder, shapes)


@pytest.mark.parametrize(
    "text", ["[", "[]", '{"weight_map": []}', "9" * 5000, "[" * 10**5, '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none(folder, shapes, text):
    (folder / INDEX).write_text(text)
    with pytest.raises(CloraError, match="index.json"):
        read_lora(folder / INDEX, shapes)


def test_a_pickle_beside_is_never_opened(folder, shapes):
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin"):
        (folder / name).write_bytes(pickle.dumps(_Opened()))
    read_lora(folder, shapes)


class _Opened:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))
