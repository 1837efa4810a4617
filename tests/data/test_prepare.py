"""Data from a config: targets, and the table of prompts."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers.pictures import write_images

from clora.commands.plan.needs import rendering_rows
from clora.data import images as images_module
from clora.data.encoders import Pictures, PromptTable
from clora.data.prepare import count_data, encode_data, pairs_note
from clora.data.rendering import Samples, render_targets
from clora.testing import merge_lora, random_data, random_teachers, tiny_config


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
    assert passes == [4] * 6, "a batch has one teacher"
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
                img_ids=adapter._image_ids(adapter.source_shapes),
                txt_ids=adapter._text_ids,
                return_dict=False,
            )[0][:, : x.shape[1]]
            for row in (data.teacher_text[1, 1:2], data.empty_text[1, 1:2])
        )
        x = x + (following - sigma) * (cond + 2 * (cond - uncond))
    torch.testing.assert_close(out[1, 1], x[0], rtol=1e-4, atol=1e-4)


def test_the_base_beside_teachers_renders_its_own_samples(adapter):
    """Whatever teachers are given, -1 is the base, also where only some teachers have samples."""
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    data = random_data(adapter, list(teachers), sources=3)
    config = tiny_config(list(teachers), sampler={"teacher_steps": 2})
    samples = Samples.of_teachers(data.sources, data.teacher_text, data.empty_text, 0).at([3, 4, 5])

    def rendered(teacher, given):
        chosen = samples._replace(teacher=torch.tensor(teacher))
        return torch.stack(list(render_targets(adapter, given, chosen, data.text, config, lambda passes: None)))

    base, taught = rendered([-1] * 3, {}), rendered([1] * 3, teachers)
    mixed = rendered([-1, 1, -1], teachers)
    assert (base - taught).abs().amax(dim=(1, 2)).min() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([base[0], taught[1], base[2]]), rtol=1e-4, atol=1e-5)
    assert torch.equal(rendered([-1] * 3, teachers), base)


def test_own_pictures_are_rendered_in_turn_up_to_the_most_of_any_effect(adapter, tmp_path):
    shared, own = write_images(tmp_path / "shared", 3, 1), write_images(tmp_path / "own", 2, 2)
    effects = [
        {"name": "a", "lora": "a", "prompt": "make it a"},
        {"name": "b", "lora": "b", "prompt": "make it b", "sources": str(own)},
    ]
    config = tiny_config(effects, data={"sources": str(shared), "general_targets": 0})
    data = encode_data(
        config, adapter, dict(zip("ab", random_teachers(adapter.pipeline.transformer, 2).values(), strict=True))
    )
    assert data.sources.shape[:2] == (2, 3)
    assert torch.equal(data.sources[1, 2], data.sources[1, 0])
    assert not torch.equal(data.sources[1, 2], data.sources[1, 1])


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
        torch.testing.assert_close(data.text[data.student_text[..., m].flatten()].embeds, students)
        torch.testing.assert_close(data.text[data.teacher_text[:, m]].embeds, embedded("make it", "make it"))
        torch.testing.assert_close(data.text[data.empty_text[:, m]].embeds, embedded("", ""))
    source, instruction, empty = data.general_pairs.unbind(1)
    assert sorted(zip(source.tolist(), instruction.tolist(), strict=True)) == sorted(
        (s, row) for s in range(2) for row in set(instruction.tolist())
    )
    assert len(data.text) == len({"make it", "make it a", "turn it", "add", "brighten", "keep", "a picture", ""})
    torch.testing.assert_close(data.text[instruction[:1]].embeds, embedded("turn it"))
    assert (empty == data.empty_text[0, 0]).all()


def test_a_prompt_that_is_encoded_with_its_image_has_a_row_for_each():
    class Encoding:
        def prompts(self, *asked):
            self.asked = asked

    encoders, pixels = Encoding(), torch.randn(3, 3, 4, 4)
    table, pictures = PromptTable(text_sees_image=True), Pictures("some", pixels)
    others = Pictures("others", pixels)
    first = table.rows("p", pictures, torch.tensor([2, 0, 2]))
    assert first.tolist() == [0, 1, 0]
    assert table.rows("q", pictures, torch.tensor([0])).tolist() == [2]
    assert table.rows("p", others, torch.tensor([2])).tolist() == [3]
    table.encode(encoders)
    assert encoders.asked == (["p", "p", "q", "p"], [(pictures, 2), (pictures, 0), (pictures, 0), (others, 2)])
    assert table.prompts[1:3] == ["p", "q"]


def test_pictures_are_read_a_chunk_at_a_time(adapter, tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 9)
    config = tiny_config(["a"], data={"sources": str(images), "general_targets": 4, "sources_per_effect": 2})
    teachers = {"a": random_teachers(adapter.pipeline.transformer, 1).popitem()[1]}
    whole = encode_data(config, adapter, teachers)
    monkeypatch.setattr("clora.data.encoders.IMAGES_AT_ONCE", 2)
    read, alive = images_module.load_image, []
    most = 0

    def load(file, size):
        nonlocal most
        pixels = read(file, size)
        alive.append(weakref.ref(pixels))
        most = max(most, sum(ref() is not None for ref in alive))
        return pixels

    monkeypatch.setattr(images_module, "load_image", load)
    data = encode_data(config, adapter, teachers)
    assert len(alive) == 9, "each is decoded once"
    assert most <= 2 * 2, "those of a chunk, and of the one before"
    assert len(data.general_sources) == 9
    torch.testing.assert_close(data.general_sources[:], whole.general_sources[:])


@pytest.mark.parametrize("stated", [None, 5])
def test_fewer_general_pairs_than_there_could_be_are_reported(tmp_path, stated):
    images = write_images(tmp_path / "images", 8)
    config = tiny_config(
        ["a"],
        data={
            "sources": str(images),
            "general_targets": 0,
            "general_pairs": stated,
            "general_instructions": tuple(f"edit {i}" for i in range(100)),
        },
    )
    note = pairs_note(config, True)
    assert note is None if stated else note.startswith("the general stream has 512 of 800 pairs")
    assert pairs_note(config, False) is None
    assert count_data(config, True).prompts == 2 * 8 + (5 if stated else 512) + 8
