"""Answers of small language models in the shapes they come in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clora.commands.prompts.writers import MAX_CHARACTERS, distinct, sentences

TWO = ["thin white lines on blue", "the scene as a technical drawing"]


@pytest.mark.parametrize(
    "answer",
    [
        "thin white lines on blue\nthe scene as a technical drawing",
        "1. thin white lines on blue\n\n2. the scene as a technical drawing\n",
        "(1) thin white lines on blue\n(2) the scene as a technical drawing",
        "1) **thin white lines on blue**\n2) *the scene as a technical drawing*",
        "- thin white lines on blue\n* the scene as a technical drawing",
        "• “thin white lines on blue”\n• 'the scene as a technical drawing'",
        'Description 1: "thin white lines on blue"\nDescription 2: "the scene as a technical drawing"',
        '"1. thin white lines on blue",\n"2. the scene as a technical drawing",',
        "Sure! Here are two descriptions:\n\nthin white lines on blue\nthe scene as a technical drawing\n\nI hope this helps!",
        "### Descriptions\n`thin white lines on blue`\n`the scene as a technical drawing`",
        '```json\n["thin white lines on blue", "the scene as a technical drawing"]\n```',
        '{"prompts": [{"id": 1, "text": "thin white lines on blue"}, {"id": 2, "text": "the scene as a technical drawing"}]}',
        "<think>\nWhat do they want? 1. lines\n</think>\n\nthin white lines on blue\nthe scene as a technical drawing",
        "I should think of two.\n</think>\nthin white lines on blue\nthe scene as a technical drawing",
        "thin white lines on blue\nthe scene as a technical drawing\n<think>and one that is cut off",
        "<|im_start|>thin white lines on blue\nthe scene as a technical drawing<|im_end|>",
        "thin white lines on blue\nThin white lines, on blue.\nthe scene as a technical drawing",
        "thin   white lines on\tblue\r\nthe scene as a technical drawing\r\n",
        "thin white lines on blue\nthe scene as a technical drawing [",
    ],
)
def test_two_sentences_in_many_shapes(answer):
    found = sentences(answer)
    assert found[0] == TWO[0]
    assert found[1].removesuffix(" [") == TWO[1]
    assert len(found) == 2


def test_numbers_within_a_line():
    assert sentences("1. Turn it blue. 2. Draw thin lines! 3) Add 2.5 times more grain.") == [
        "Turn it blue.",
        "Draw thin lines!",
        "Add 2.5 times more grain.",
    ]


def test_not_quite_json():
    assert sentences('["thin white lines on blue", "the scene as a technical drawing",]') == TWO
    assert sentences('```json\n{"prompts": [\n"thin white lines on blue",\n"the scene as a tech') == TWO[:1]


def test_brackets_in_a_sentence():
    assert sentences("thin white lines [1] on blue") == ["thin white lines [1] on blue"]


def test_what_belongs_to_a_sentence_is_kept():
    for text in (
        "3D shapes of wet clay",
        "8-bit pixel art, 16 colours",
        "the sky: pale, the ground: dark",
        "make it 'old'",
    ):
        assert sentences(text) == [text]


def test_other_languages():
    assert sentences("1. 把图片变成蓝图风格\n2. lignes fines et blanches") == [
        "把图片变成蓝图风格",
        "lignes fines et blanches",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "\n \n",
        "...",
        "Blueprint",
        "a b",
        "Here are four descriptions of the effect:",
        "Sure, I can do that for you",
        "<snow_Xy1234> white flakes fall",
        "white fl\ufffdkes fall",
        "white\x00flakes fall",
        'draw it as a "blue',
        "12 34 56 78 90 12 ok then",
        "word " * (MAX_CHARACTERS // 5 + 1),
        "<think>white flakes fall slowly",
        "[]",
        "[" * 10_000,
    ],
)
def test_nothing_of_use(answer):
    assert sentences(answer) == []


@settings(deadline=None)  # the cores may be busy
@given(st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "replace")))
def test_any_text_is_read_without_an_error(answer):
    for text in sentences(answer):
        assert 6 <= len(text) <= MAX_CHARACTERS
        assert text == text.strip()
        assert text.isprintable()


def test_random_tokens_of_a_tokenizer():
    from clora.studio.text import train_tokenizer
    from clora.testing import SENTENCES

    tokenizer = train_tokenizer(SENTENCES)
    for seed in range(20):
        ids = torch.randint(len(tokenizer), (40,), generator=torch.Generator().manual_seed(seed))
        sentences(tokenizer.decode(ids))


def test_distinct_keeps_the_first_of_each():
    assert distinct(["A b.", "c", "a, b", "C!", "d"]) == ["A b.", "c", "d"]
