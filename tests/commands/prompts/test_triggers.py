"""Triggers: the least similar of their candidates, in a space that what all prompts share does not reach."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clora.commands.prompts.triggers import (
    Similarity,
    choose_triggers,
    mean_of_tokens,
    num_shared_tokens,
    similarities,
    text_space,
)
from clora.models.conditioning import Text


def embed(texts):
    """Unit vectors in the plane at the angle that a text names, in degrees."""
    angle = torch.tensor([float(text) for text in texts], dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_mean_of_tokens_leaves_padding_out():
    embeds, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, True, True]])
    expected = torch.stack([embeds[0, :2].mean(0), embeds[1].mean(0)])
    torch.testing.assert_close(mean_of_tokens(Text(embeds, mask)), expected)
    torch.testing.assert_close(mean_of_tokens(Text(embeds)), embeds.mean(1))
    assert mean_of_tokens(Text(embeds.bfloat16())).dtype == torch.float32
    torch.testing.assert_close(mean_of_tokens(Text(embeds, mask), 1)[0], embeds[0, 1])


def test_shared_tokens():
    embeds = torch.randn(1, 6, 4).repeat(3, 1, 1)
    assert num_shared_tokens(Text(embeds)) == 0, "all are alike: nothing is left out"
    embeds[1, 4] += 1
    embeds[2, 3] *= 1.5
    embeds[1, 1] *= 1.001
    assert num_shared_tokens(Text(embeds)) == 3


def test_the_length_of_a_text_weighs_nothing_beside_an_image_before_it():
    """Image tokens at the start, which are long and the same: with them, texts of one length would look alike."""
    image, words = 100 * torch.randn(50, 8), {word: normalize(torch.randn(8), dim=0) for word in "abcd"}
    texts = ["a", "b", "aaaa", "bbbb", "cd", "ddc"]

    def encode(some):
        return Text.cat([Text(torch.cat([image, torch.stack([words[w] for w in text])])[None]) for text in some])

    space = text_space(encode, texts)
    plain = text_space(lambda some: Text.cat([Text(torch.stack([words[w] for w in t])[None]) for t in some]), texts)
    torch.testing.assert_close(space(texts), plain(texts), atol=1e-4, rtol=0)


def test_text_space():
    """Less the mean of the reference, normalised; in batches, which change nothing."""
    table = {name: torch.randn(2, 5) for name in "abcdefgh"}
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return Text(torch.stack([table[text] for text in texts]))

    space = text_space(encode, "fgh", batch_size=2)
    found = space("abcde")
    centre = torch.stack([table[name].mean(0) for name in "fgh"]).mean(0)
    expected = normalize(torch.stack([table[name].mean(0) - centre for name in "abcde"]), dim=-1)
    torch.testing.assert_close(found, expected)
    assert calls == [2, 2, 1, 2, 2, 1]


def test_what_all_prompts_share_does_not_distinguish_them():
    """One huge channel in every token: raw cosines would all be 1."""
    own = torch.eye(4, 6, dtype=torch.float64)
    shared = torch.zeros(6, dtype=torch.float64)
    shared[5] = 1e4
    table = dict(zip("abcd", own, strict=True))
    space = text_space(lambda texts: Text(torch.stack([table[t] + shared for t in texts])[:, None]), "abcd")
    cosines = space("abcd") @ space("abcd").T
    torch.testing.assert_close(cosines[0, 1:], torch.full((3,), -1 / 3), atol=1e-3, rtol=0)


def test_greedy_choice_by_hand():
    # 1st: candidates 0, 80; other prompts at 30 and 180: cos 30 = .87, cos 50 = .64: 80.
    # 2nd: candidates 85, 300; chosen 80, other prompts 10 and 180: cos 5, cos 70 = .34: 300.
    # 3rd: candidates 290, 135, 215; chosen 80 and 300, others' prompts 10 and 30: cos 10; cos 55 = .57; cos 85 = .09: 215.
    candidates = [["0", "80"], ["85", "300"], ["290", "135", "215"]]
    assert choose_triggers(candidates, ["10", "30", "180"], embed) == ["80", "300", "215"]


def test_a_stated_trigger_is_avoided_by_effects_before_it():
    assert choose_triggers([["0", "180"], ["5"]], ["90", "90"], embed) == ["180", "5"]
    assert choose_triggers([["180", "0"], ["175"]], ["90", "90"], embed) == ["0", "175"]


def test_an_effects_own_prompt_may_be_near():
    assert choose_triggers([["0", "90"], ["270"]], ["0", "100"], embed) == ["0", "270"]


def test_of_equals_and_of_one_the_first():
    assert choose_triggers([["90", "90.0"], ["0"]], ["180", "180"], embed) == ["90", "0"]
    assert choose_triggers([["90.0", "90"], ["0"]], ["180", "180"], embed) == ["90.0", "0"]
    assert choose_triggers([["7", "8"]], ["1"], embed) == ["7"]


def test_a_choice_is_never_worse_than_the_first_candidates():
    """Of two effects, the greedy choice for the second is the best there is, given the first."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        table = normalize(torch.randn(10, 6, generator=generator), dim=-1)
        texts = [str(i) for i in range(10)]
        space = lambda names, table=table: table[[int(name) for name in names]]  # noqa: E731
        first, second = choose_triggers([texts[:1], texts[1:8]], texts[8:], space)

        def worst(name, table=table):
            return max(float(table[int(name)] @ table[other]) for other in (0, 8))

        assert first == "0"
        assert worst(second) == min(worst(name) for name in texts[1:8])


def test_similarities_by_hand():
    names, triggers = ["a", "b", "c"], ["0", "60", "150"]
    prompts = [["0", "140"], ["20"], ["200", "75"]]
    cos = lambda degrees: round(float(torch.tensor(degrees, dtype=torch.float64).deg2rad().cos()), 3)  # noqa: E731
    assert similarities(names, triggers, prompts, embed) == [
        Similarity(trigger=(cos(60), "b"), prompt=(cos(20), "b")),
        Similarity(trigger=(cos(60), "a"), prompt=(cos(15), "c")),
        Similarity(trigger=(cos(90), "b"), prompt=(cos(10), "a")),
    ]


def test_a_single_effect_resembles_nothing():
    assert similarities(["a"], ["0"], [["0"]], embed) == [Similarity(None, None)]


@pytest.fixture(scope="module")
def studio_space():
    """The text space of the studio's trained text encoder."""
    from clora.config.everyday import everyday_instructions
    from clora.models import adapter_for
    from clora.models.loading import load_pipeline
    from clora.studio.assets import pipeline_folder

    adapter = adapter_for(load_pipeline(str(pipeline_folder()), "cpu"), (64, 64), 64)
    return text_space(adapter.encode_prompts, everyday_instructions())


def test_descriptions_of_one_effect_are_nearest_in_a_trained_encoders_space(studio_space):
    from clora.studio.effects import EFFECTS

    effects = list(EFFECTS.values())[::3]
    cosines = studio_space([e.prompt for e in effects]) @ studio_space([e.description for e in effects]).T
    right = (cosines.argmax(1) == torch.arange(len(effects))).float().mean()
    assert right > 0.6, "of 24"
    own = cosines.diagonal().mean()
    others = (cosines.sum() - cosines.diagonal().sum()) / (cosines.numel() - len(effects))
    assert own - others > 0.2


def test_chosen_triggers_are_further_apart_than_the_default_ones(studio_space):
    from clora.config.prompts_file import make_trigger
    from clora.studio.effects import EFFECTS

    names = list(EFFECTS)[:8]
    prompts = [EFFECTS[name].prompt for name in names]
    chosen = choose_triggers([[make_trigger(n, k) for k in range(8)] for n in names], prompts, studio_space)

    def worst(triggers):
        found = similarities(names, triggers, [[prompt] for prompt in prompts], studio_space)
        return sum(max(line.trigger[0], line.prompt[0]) for line in found) / len(found)

    default = [make_trigger(name) for name in names]
    assert worst(chosen) < worst(default) - 0.03
    assert len(set(chosen)) == 8
    assert all(trigger.startswith(f"<{name}_") for name, trigger in zip(names, chosen, strict=True))
