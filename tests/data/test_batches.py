"""The two streams and the batches drawn from them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from clora.data.batches import GENERAL, BatchSampler
from clora.models.conditioning import Text
from clora.testing import random_data, tiny_config


def sampler(adapter, batch_size=6, **objective):
    effects = ["effect_0", "effect_1", "effect_2"]
    config = tiny_config(effects, objective=objective)
    data = random_data(adapter, effects)
    return BatchSampler(data, config.objective, batch_size, torch.Generator().manual_seed(0)), data


def test_streams_have_their_share_and_are_redrawn_in_time(adapter):
    draws, _ = sampler(adapter, 4000, switch_probability=0.3)
    general = draws.draw(0).effect == GENERAL
    assert abs(float(general.float().mean()) - 0.7) < 0.03
    draws, _ = sampler(adapter, 64, switch_every=3)
    streams = [draws.draw(update).effect == GENERAL for update in range(4)]
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])
    assert not torch.equal(streams[0], streams[3])
    for off in ("dual_stream", "backward_simulation"):  # the latter is the general stream's only loss
        draws, _ = sampler(adapter, 64, **{off: False})
        assert (draws.draw(0).effect >= 0).all()
    draws, _ = sampler(adapter, 64)
    assert (draws.draw_targets(0).effect >= 0).all()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_batch_holds_matching_rows(adapter, orthogonal):
    draws, data = sampler(adapter, 200, orthogonal_prompting=orthogonal)
    batch = draws.draw(0)
    assert torch.equal(batch.student.source, batch.teacher.source)
    phrasings = set()
    for i, e in enumerate(batch.effect.tolist()):
        source, target, student, teacher = (
            batch.student.source[i],
            batch.target[i],
            batch.student.text.embeds[i],
            batch.teacher.text.embeds[i],
        )
        assert torch.equal(batch.uncond.text.embeds[i], data.text.embeds[-1])
        assert torch.equal(batch.uncond.source[i], source)
        if e == GENERAL:
            pairs = [(data.general_sources[s], data.text.embeds[t]) for s, t, _ in data.general_pairs.tolist()]
            assert any(torch.equal(source, s) and torch.equal(student, t) for s, t in pairs)
            assert torch.equal(student, teacher)
            assert not target.any()
            continue
        pairs = zip(data.sources[e], data.targets[e], strict=True)
        assert any(torch.equal(source, s) and torch.equal(target, t) for s, t in pairs)
        assert torch.equal(teacher, data.text.embeds[data.teacher_text[e, 0]])
        if orthogonal:
            asked = data.text.embeds[data.student_text[e, :, 0]]
            phrasings.add((e, next(p for p, t in enumerate(asked) if torch.equal(student, t))))
        else:
            assert torch.equal(student, teacher)
    assert phrasings == ({(e, p) for e in range(3) for p in range(2)} if orthogonal else set())


def test_a_prompt_encoded_with_its_image_goes_with_that_image(adapter):
    """In families whose text encoder sees the source, every pair of prompt and source has a row of its own."""
    effects, rows = ["effect_0", "effect_1", "effect_2"], torch.arange(3 * 3)
    data = random_data(adapter, effects)
    text = Text(torch.randn(9 + 18 + 9 + 12, 2, 24))
    data = dataclasses.replace(
        data,
        text=text,
        teacher_text=rows.view(3, 3),
        student_text=9 + torch.arange(18).view(3, 2, 3),
        empty_text=27 + rows.view(3, 3),
        general_pairs=torch.stack([torch.arange(12) % 4, 36 + torch.arange(12), 36 + torch.arange(12).flip(0)], 1),
    )
    batch = BatchSampler(data, tiny_config(effects).objective, 200, torch.Generator().manual_seed(0)).draw(0)

    def row(conditioning, i):
        return next(r for r in range(len(text)) if torch.equal(text.embeds[r], conditioning.text.embeds[i]))

    for i, e in enumerate(batch.effect.tolist()):
        teacher, student, empty = (row(c, i) for c in (batch.teacher, batch.student, batch.uncond))
        if e == GENERAL:
            assert student == teacher
            pair = teacher - 36
            assert empty == 47 - pair
            assert torch.equal(batch.teacher.source[i], data.general_sources[pair % 4])
            continue
        m = teacher - 3 * e
        assert torch.equal(batch.teacher.source[i], data.sources[e, m])
        assert torch.equal(batch.target[i], data.targets[e, m])
        assert student in (9 + 6 * e + m, 9 + 6 * e + 3 + m)
        assert empty == 27 + 3 * e + m


def test_general_targets_belong_to_their_pair(adapter):
    effects = ["effect_0", "effect_1", "effect_2"]
    data = random_data(adapter, effects)  # 4 sources, 3 instructions
    targets = torch.randn(7, *adapter.latent_shape)
    data = dataclasses.replace(data, general_pairs=data.general_pairs[:7], general_targets=targets)
    objective = tiny_config(effects, objective={"backward_simulation": False}).objective
    draws = BatchSampler(data, objective, 200, torch.Generator().manual_seed(0))
    batch = draws.draw_targets(0)
    assert batch.has_target.all()
    pairs = set()
    for row in torch.nonzero(batch.effect == GENERAL).flatten():
        pair = next(p for p in range(7) if torch.equal(batch.target[row], data.general_targets[p]))
        assert torch.equal(batch.student.source[row], data.general_sources[pair % 4])
        instruction = data.general_pairs[pair, 1]
        assert torch.equal(batch.student.text.embeds[row], data.text.embeds[instruction])
        pairs.add(pair)
    assert pairs == set(range(7))
    assert (batch.effect >= 0).any()
    effects_only = batch[batch.effect >= 0]
    assert torch.equal(effects_only.target, batch.target[batch.effect >= 0])
