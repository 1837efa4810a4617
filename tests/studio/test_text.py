"""The text encoder learns the meaning of a sentence, which is read from the layers that the pipeline taps."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2KleinPipeline

from clora.studio import text
from clora.studio.making import text_training


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    tokenizer = text.train_tokenizer(text.prompt_corpus(edits_per_family=4))
    return tokenizer, text.make_text_encoder(len(tokenizer))


def test_sentences_hold_their_meaning():
    sentences = text_training.draw_sentences(0, 200)
    for sentence, (kind, *slots) in sentences:
        assert all(word in sentence for word in slots)
        assert kind.startswith("effect ") <= (slots == ["", "", ""])
    assert 0.15 < sum(kind.startswith("effect ") for _, (kind, *_) in sentences) / 200 < 0.35
    assert len({meaning for _, meaning in sentences}) > 100


def test_taps_are_what_the_pipeline_conditions_on(words):
    tokenizer, encoder = words
    sentence = "paint the red circle blue"
    tokens, mask = text_training.tokenize(tokenizer, [sentence])
    pipeline = Flux2KleinPipeline(None, None, encoder.eval(), tokenizer, None)
    expected, _ = pipeline.encode_prompt(sentence, device="cpu", max_sequence_length=text.MAX_SEQUENCE_LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(text_training.taps(encoder, tokens, mask), expected)


@pytest.mark.slow
def test_training_lowers_the_loss_and_freezes(words, monkeypatch):
    tokenizer, encoder = words
    monkeypatch.setattr(text_training, "NUM_SENTENCES", 8)
    monkeypatch.setattr(text_training, "NUM_CHECKED", 8)
    monkeypatch.setattr(text_training, "BATCH", 32)  # every sentence in nearly every batch: losses can be compared
    losses = []
    accuracy = text_training.train_text_encoder(encoder, tokenizer, 20, 0, lambda _, v: losses.append(v["loss"]))
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    assert 0 <= accuracy <= 1
    assert not any(p.requires_grad for p in encoder.parameters())
