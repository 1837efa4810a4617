"""Encoding and rendering behind the cache: existing entries are read, only missing ones made, with the same result."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from helpers.pictures import write_images
from safetensors.torch import save

from clora.bank.bank import RoutedLinear
from clora.data import encoders as encoders_module
from clora.data.batches import BatchSampler
from clora.data.cache import Cache, Entries
from clora.data.encoders import Decoded, Encoders, Picture, Pictures
from clora.data.prepare import encode_data
from clora.data.rendering import lora_digest
from clora.data.tables import TextTable
from clora.errors import CloraError
from clora.models.conditioning import Text
from clora.testing import random_lora, tiny_adapter, tiny_config, tiny_pipeline

EFFECTS = ("blueprint", "snow")


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


@pytest.fixture(scope="module")
def teachers(adapter):
    transformer = adapter.pipeline.transformer
    return {name: random_lora(transformer, 2 + i, i) for i, name in enumerate((*EFFECTS, "third"))}


@pytest.fixture
def encode(adapter, teachers, tmp_path):
    """Returns encode(cache, names, **sections): the data of some effects."""
    images = write_images(tmp_path / "images", 4)

    def run(cache, names=EFFECTS, used=teachers, device=None, **sections):
        data = {"sources": str(images), "sources_per_effect": 2, "general_targets": 3, **sections.pop("data", {})}
        config = tiny_config(names, data=data, **sections)
        chosen = {effect.name: used[effect.name] for effect in config.effects}
        return encode_data(config, adapter, chosen, cache, device)

    return run


@pytest.fixture
def work(adapter, monkeypatch):
    """Counts what is encoded and the transformer's passes."""
    counts = {}

    def count(name, of):
        function = getattr(adapter, name)

        def counting(*arguments, **keywords):
            counts[name] = counts.get(name, 0) + of(*arguments)
            return function(*arguments, **keywords)

        monkeypatch.setattr(adapter, name, counting)

    count("encode_prompts", lambda prompts, references=None: len(prompts))
    count("encode_sources", lambda references: len(references[0]))
    count("velocity", lambda x, *rest: len(x))
    return counts


def tensors(data):
    """All of it, with what is read from files."""
    whole = {f.name: getattr(data, f.name) for f in fields(data) if f.name not in ("effects", "text")}
    return {name: part[:] for name, part in whole.items() if part is not None} | {"embeds": data.text[:].embeds}


def same(data, other):
    other = tensors(other)
    return all(torch.equal(tensor, other[name]) for name, tensor in tensors(data).items())


def passes(samples):
    return samples * 2 * 2  # two guided steps


def test_a_second_run_encodes_and_renders_nothing_and_has_the_same_data(encode, work, tmp_path):
    plain = encode(Cache(None))
    assert same(encode(Cache(tmp_path / "c")), plain)
    assert work["velocity"] == 2 * passes(2 * 2 + 3)
    work.clear()
    assert same(encode(Cache(tmp_path / "c")), plain)
    assert not work


def test_one_effect_more_costs_itself(encode, work, tmp_path):
    encode(Cache(tmp_path / "c"))
    work.clear()
    data = encode(Cache(tmp_path / "c"), (*EFFECTS, "third"))
    assert work["velocity"] == passes(2)
    assert "encode_sources" not in work
    whole = encode(Cache(None), (*EFFECTS, "third"))
    for name, tensor in tensors(data).items():
        torch.testing.assert_close(tensor, tensors(whole)[name], rtol=1e-5, atol=1e-5, msg=name)


def test_only_the_chunk_of_a_new_image_is_encoded(encode, work, monkeypatch, tmp_path):
    monkeypatch.setattr(encoders_module, "IMAGES_AT_ONCE", 4)
    encode(Cache(tmp_path / "c"))
    work.clear()
    write_images(tmp_path / "images", 5)  # the first four as they were
    encode(Cache(tmp_path / "c"))
    assert work["encode_sources"] == 1


@pytest.mark.parametrize(
    ("changed", "samples"),
    [
        ({"sampler": {"steps": 3, "shift": 5.0}}, 0),  # the student's
        ({"data": {"held_out": 1}}, 0),
        ({"train": {"updates": 7}}, 0),
        ({"seed": 100}, 7),
        ({"sampler": {"guidance": 2.0}}, 7),
        ({"sampler": {"teacher_norm_rescale": True}}, 7),
        ({"names": [{"name": "blueprint", "lora": "x", "prompt": "another prompt"}, "snow"]}, 2),
        ({"names": [{"name": "blueprint", "lora": "x", "prompt": "make it blueprint", "trigger": "<b>"}, "snow"]}, 0),
    ],
)
def test_what_a_target_depends_on_renders_it_again(encode, work, tmp_path, changed, samples):
    encode(Cache(tmp_path / "c"))
    work.clear()
    encode(Cache(tmp_path / "c"), **changed)
    assert work.get("velocity", 0) == passes(samples)


def test_another_lora_or_transformer_renders_again(encode, adapter, teachers, work, tmp_path):
    encode(Cache(tmp_path / "c"))
    work.clear()
    encode(Cache(tmp_path / "c"), used={**teachers, "snow": random_lora(adapter.pipeline.transformer, 3, 50)})
    assert work == {"velocity": passes(2)}
    work.clear()
    weight = adapter.pipeline.transformer.proj_out.weight
    weight *= 1.5
    try:
        encode(Cache(tmp_path / "c"))
    finally:
        weight /= 1.5
    assert work == {"velocity": passes(2 * 2 + 3)}


def test_a_stop_while_rendering_loses_one_batch(encode, adapter, work, monkeypatch, tmp_path):
    velocity, cache = adapter.velocity, Cache(tmp_path / "c")
    sections = {"data": {"sources_per_effect": 4, "general_targets": 0}, "train": {"forward_rows": 6}}

    def stopping(x, *rest):
        if work.get("velocity", 0) == passes(4):  # the first teacher's batches, of three samples and of one
            raise KeyboardInterrupt
        return velocity(x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "velocity", stopping)
        with pytest.raises(KeyboardInterrupt):
            encode(cache, **sections)
    assert not any(isinstance(module, RoutedLinear) for module in adapter.pipeline.transformer.modules())
    work.clear()
    data = encode(cache, **sections)
    assert work == {"velocity": passes(4)}
    assert same(encode(Cache(None), **sections), data)


def test_work_that_was_stopped_at_any_entry_ends_with_the_same_bits(encode, adapter, monkeypatch, tmp_path):
    """Encodings and renders are made in the batches of a run that was not stopped."""
    monkeypatch.setattr(encoders_module, "PROMPTS_AT_ONCE", 5)
    monkeypatch.setattr(encoders_module, "IMAGES_AT_ONCE", 3)
    sections = {"data": {"sources_per_effect": 4}, "train": {"forward_rows": 6}}
    plain = encode(Cache(None), **sections)
    write, written = Entries._write, []

    def stopping(self, *entry):
        if len(written) == stop:
            raise KeyboardInterrupt
        written.append(self._kind)
        write(self, *entry)

    monkeypatch.setattr(Entries, "_write", stopping)
    stop = -1
    encode(Cache(tmp_path / "whole"), **sections)
    assert set(written) == {"prompts", "sources", "targets"}
    for last in range(1, len(written), 3):  # a chunk has three at most, of prompts five
        stop = last
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            encode(Cache(tmp_path / str(last)), **sections)
        stop = -1
        assert same(encode(Cache(tmp_path / str(last)), **sections), plain), last


def test_rows_are_read_from_files_and_equal_those_in_memory(encode, tmp_path, monkeypatch):
    """Batches have the same bits; no tensor of the data is in memory, and no file is hashed again."""
    kept, files = encode(Cache(None)), encode(Cache(tmp_path / "c"))
    assert not any(part._in_memory for part in (*files.sources.parts, *files.targets.parts, files.text._entries))
    monkeypatch.setattr("clora.data.cache.tensor_digest", None)
    objective, drawn = tiny_config(EFFECTS).objective, []
    for data in (kept, files):
        sampler = BatchSampler(data, objective, 8, torch.Generator().manual_seed(0))
        drawn.append([sampler.draw(update) for update in range(4)])
    for ours, theirs in zip(*drawn, strict=True):
        assert torch.equal(ours.target, theirs.target)
        for name in ("student", "teacher", "uncond"):
            one, other = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(one.source, other.source)
            assert torch.equal(one.text.embeds, other.text.embeds)
    assert kept.targets.shape == files.targets.shape == (2, 2, *kept.targets[0, 0].shape)


@pytest.mark.parametrize("damage", ["removed", "cut", "replaced"])
def test_a_file_that_is_damaged_while_training_is_one_error_and_made_again(encode, tmp_path, damage):
    data = encode(Cache(tmp_path / "c"))
    before = data.targets[:]
    for path in (tmp_path / "c" / "targets").iterdir():
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:-1] if damage == "cut" else save({"latents": torch.zeros(1, 1)}))
    with pytest.raises(
        CloraError, match=r"targets.*safetensors is needed until the end of training and was removed or"
    ):
        data.targets[1, 1]
    assert torch.equal(encode(Cache(tmp_path / "c")).targets[:], before)


def test_prompts_have_the_padding_and_masks_of_one_table(tmp_path):
    """Whatever prompts are read at once: as all of them joined, of which rows are taken."""
    lengths = (2, 5, 5, 3)
    rows = [Text(torch.randn(1, length, 2), pooled=torch.randn(1, 3)) for length in lengths]
    for chosen in ([0, 1, 2, 3], [1, 2]):
        entries = Cache(tmp_path).entries("prompts")
        made = [{"embeds": rows[i].embeds[0], "pooled": rows[i].pooled[0]} for i in chosen]
        entries.extend([{"i": i} for i in chosen], [range(len(chosen))], str, lambda chunks, made=made: made)
        joined, table = Text.cat([rows[i] for i in chosen]), TextTable(entries)
        for some in (torch.tensor([1, 1]), torch.tensor([0]), slice(None)):
            expected, found = joined[some], table[some]
            assert torch.equal(found.embeds, expected.embeds)
            assert torch.equal(found.pooled, expected.pooled)
            assert (found.mask is None) == (expected.mask is None) == (len(chosen) == 2)
            assert found.mask is None or torch.equal(found.mask, expected.mask)


def test_values_that_are_not_finite_stop_at_the_first(encode, adapter, monkeypatch, tmp_path):
    """Named by effect and picture; what is wrong is not kept."""
    velocity, encode_images = adapter.velocity, adapter.encode_images

    def broken(x, sigma, conditioning):
        v = velocity(x, sigma, conditioning)
        return torch.where(torch.arange(len(v))[:, None, None] == 1, torch.inf, v)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "velocity", broken)
        with pytest.raises(CloraError, match=r"effect 'blueprint', the target of picture 2 of .*images: .* NaN or inf"):
            encode(Cache(tmp_path / "c"))
    assert len(list((tmp_path / "c" / "targets").iterdir())) == 1
    monkeypatch.setattr(adapter, "encode_images", lambda images: encode_images(images) * torch.nan)
    with pytest.raises(CloraError, match=r"picture 1 of .*images: what the model makes of it has NaN"):
        encode(Cache(tmp_path / "d"))
    assert not (tmp_path / "d" / "sources").exists()


def test_given_targets_are_encoded_once(encode, adapter, monkeypatch, tmp_path):
    before, after = write_images(tmp_path / "before", 2, 1), write_images(tmp_path / "after", 2, 2)
    names = [
        {"name": "blueprint", "lora": "x", "prompt": "draw it", "sources": str(before), "targets": str(after)},
        "snow",
    ]
    first = encode(Cache(tmp_path / "c"), names)
    monkeypatch.setattr(adapter, "encode_images", None)
    monkeypatch.setattr(adapter, "encode_sources", None)
    assert same(encode(Cache(tmp_path / "c"), names), first)


def test_a_lora_is_known_by_its_factors(adapter):
    transformer = adapter.pipeline.transformer
    found = [lora_digest(random_lora(transformer, 2, seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


class Masked:
    """A family that encodes prompts with their image, padded to the longest prompt beside them."""

    max_sequence_length = 40
    calls = 0

    def __init__(self):
        self.pipeline = tiny_pipeline()

    def encode_prompts(self, prompts, references):
        self.calls += len(prompts)
        length = max(len(prompt) for prompt in prompts)
        embeds = torch.full((len(prompts), length, 2), torch.nan)
        mask = torch.zeros(len(prompts), length, dtype=torch.bool)
        for i, (prompt, image) in enumerate(zip(prompts, references[0], strict=True)):
            embeds[i, : len(prompt)] = len(prompt) + image.mean()
            mask[i, : len(prompt)] = True
        return Text(embeds, mask, torch.arange(len(prompts))[:, None] * 0 + embeds[:, :1, 0])


def test_a_prompt_with_its_image_does_not_depend_on_those_beside_it(tmp_path):
    family, images = Masked(), torch.randn(3, 3, 4, 4)
    encoders = Encoders(family, Cache(tmp_path), None)
    pictures = Pictures("", images)
    first = encoders.prompts(["long prompt", "a"], [Picture(pictures, 0), Picture(pictures, 1)])[:]
    assert family.calls == 2
    second = encoders.prompts(["a", "a", "abc"], [Picture(pictures, i) for i in (1, 2, 0)])[:]
    assert family.calls == 5, "the first was there; it is encoded again beside the others of its chunk, and not kept"
    assert first.embeds.shape == (2, 11, 2)
    assert second.embeds.shape == (3, 3, 2), "not as long as the prompt that it was once encoded beside"
    assert second.mask.tolist() == [[True, False, False], [True, False, False], [True, True, True]]
    expected = [1 + images[1].mean(), 1 + images[2].mean(), 3 + images[0].mean()]
    for row, value in enumerate(expected):
        kept = second.embeds[row][second.mask[row]]
        torch.testing.assert_close(kept, value.expand_as(kept))
        torch.testing.assert_close(second.pooled[row], value[None])
    assert torch.isfinite(second.embeds).all(), "padding is zero"


@pytest.mark.parametrize("hit", [False, True])
def test_encoders_are_on_the_device_only_while_they_encode(encode, adapter, monkeypatch, tmp_path, hit):
    """The moves are recorded, not made, since there is only one device here."""
    moved, device = [], torch.device("meta")
    names = {id(part): name for name, part in adapter.pipeline.components.items()}
    if hit:
        encode(Cache(tmp_path / "c"))
    for module in ("clora.data.encoders.move", "clora.data.prepare.move"):
        monkeypatch.setattr(module, lambda model, where: moved.append((names[id(model)], where.type)))
    encode_sources = adapter.encode_sources
    monkeypatch.setattr(adapter, "encode_sources", lambda r: moved.append("encoded") or encode_sources(r))
    encode(Cache(tmp_path / "c"), device=device)
    there = [("text_encoder", "meta"), ("vae", "meta")]
    back = [("text_encoder", "cpu"), ("vae", "cpu")]
    assert sorted(moved[:2]) == ([] if hit else there) + ([("transformer", "meta")] if hit else [])
    if not hit:
        assert moved[2] == "encoded"
        assert sorted(moved[3:5]) == back
        assert moved[5:] == [("transformer", "meta")]


def test_a_model_that_cannot_move_stays():
    model = torch.nn.Linear(2, 2)
    model.is_loaded_in_8bit = True
    encoders_module.move(model, torch.device("meta"))
    assert model.weight.device.type == "cpu"
    model.is_loaded_in_8bit = False
    encoders_module.move(model, torch.device("meta"))
    assert model.weight.device.type == "meta"


def test_a_picture_that_changes_between_two_parts_is_never_kept_under_the_hash_of_before():
    pictures = Pictures("snow", torch.zeros(2, 3, 4, 4))
    first = Decoded([Picture(pictures, 0), Picture(pictures, 1)])
    digests = first.digests()
    assert torch.equal(first.pixels(), pictures.pixels)
    pictures.pixels[1] = 1.0
    later = Decoded([Picture(pictures, 0), Picture(pictures, 1)])
    assert later.digests() == digests, "of pictures that are known nothing is decoded"
    with pytest.raises(CloraError, match="picture 2 of snow has changed while pictures were read"):
        later.pixels()
