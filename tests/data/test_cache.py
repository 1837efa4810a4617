"""Entries on disk: found again by everything they were made from, and never used where they are damaged."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from clora.data.cache import Cache, chunked
from clora.hashing import digest, tensor_digest

KEYS = [{"prompt": "a", "size": (16, 16)}, {"prompt": "b", "size": (16, 16)}]


def entry(i):
    return {"latents": torch.full((2, 3), float(i)).to(torch.bfloat16), "mask": torch.tensor([True, False])}


def make(made):
    """Returns make(missing) that notes what it was asked for."""

    def entries(chunks):
        made.append([i for chunk in chunks for i in chunk])
        return map(entry, made[-1])

    return entries


def refuse(missing):
    raise AssertionError(f"asked to make {missing} again")


def entries(cache, kind, keys, make, at_once=1):
    found = cache.entries(kind)
    found.extend(keys, chunked(len(keys), at_once), "entry {}".format, make)
    return found


def same(found):
    return len(found) == len(KEYS) and all(
        tensor.dtype == entry(i)[name].dtype and torch.equal(tensor, entry(i)[name])
        for i, tensors in enumerate(found)
        for name, tensor in tensors.items()
    )


def test_an_entry_is_read_again(tmp_path):
    made = []
    assert same(entries(Cache(tmp_path / "c"), "text", KEYS, make(made)))
    assert made == [[0, 1]]
    assert same(entries(Cache(tmp_path / "c"), "text", KEYS, refuse))
    turned = [dict(reversed(key.items())) for key in KEYS]
    assert same(entries(Cache(tmp_path / "c"), "text", turned, refuse)), "the order of a key's parts does not matter"
    assert len(list((tmp_path / "c" / "text").iterdir())) == 2


@pytest.mark.parametrize("change", [{"prompt": "A"}, {"size": (16, 32)}, {"seed": 1}])
def test_another_key_is_another_entry(tmp_path, change):
    made, cache = [], Cache(tmp_path)
    entries(cache, "text", KEYS, make([]))
    entries(cache, "text", [KEYS[0], {**KEYS[1], **change}], make(made))
    entries(cache, "images", KEYS[:1], make(made))
    assert made == [[1], [0]]


def test_without_a_folder_nothing_is_kept():
    made = []
    for _ in range(2):
        assert same(entries(Cache(None), "text", KEYS, make(made)))
    assert made == [[0, 1], [0, 1]]


def test_interrupted_work_keeps_its_entries(tmp_path):
    def stopped(missing):
        yield entry(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        entries(Cache(tmp_path), "text", KEYS, stopped)
    made = []
    assert same(entries(Cache(tmp_path), "text", KEYS, make(made)))
    assert made == [[1]]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def empty(path):
    path.write_bytes(b"")


def another_file(path):
    save_file(load_file(path), path)


def other_names(path):
    save_file({"pixels": load_file(path)["latents"]}, path, {"sha256": tensor_digest(entry(0)), "key": "{}"})


def another_key(path):
    save_file(entry(0), path, {"sha256": tensor_digest(entry(0)), "key": "{}"})


def no_key(path):
    save_file(entry(0), path, {"sha256": tensor_digest(entry(0)), "key": "{"})


@pytest.mark.parametrize("damage", [cut, flip, empty, another_file, other_names, another_key, no_key])
def test_a_damaged_entry_is_reported_in_one_line_and_made_again(tmp_path, capsys, damage):
    cache = Cache(tmp_path)
    entries(cache, "text", KEYS[:1], make([]))
    (path,) = (tmp_path / "text").iterdir()
    damage(path)
    made = []
    found = entries(cache, "text", KEYS, make(made))
    assert same(found)
    assert made == [[0, 1]]
    assert capsys.readouterr().err.splitlines() == [f"{path} is damaged; rebuilding it"]
    assert same(entries(cache, "text", KEYS, refuse))


def test_hashes_see_every_part():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}
    others = [
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {**tensors, "a": tensors["a"] + torch.eye(2, 3) * 1e-6},
        {"c": tensors["a"], "b": tensors["b"]},
        {"a": tensors["a"]},
    ]
    assert len({tensor_digest(t) for t in (tensors, *others)}) == 6
    turned = {name: tensors[name].clone() for name in reversed(tensors)}
    assert tensor_digest(turned) == tensor_digest(tensors)
    assert tensor_digest({"a": tensors["a"].T.contiguous().T, "b": tensors["b"]}) == tensor_digest(tensors)
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
