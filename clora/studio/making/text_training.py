"""Training the studio's text encoder to represent what a sentence asks for.

A large pipeline's text encoder already understands its prompts. The studio's is taught to: a linear reading of what
the pipeline taps names the kind of edit (or the effect) and the words in its slots. The base transformer then
finds in every token what it needs, instead of having to learn language from pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clora.studio.edits import FAMILIES, sample_edit
from clora.studio.effects import EFFECTS
from clora.studio.making.optimizers import rate_factor
from clora.studio.photographs import Photographs
from clora.studio.scenes import COLOURS, make_scene
from clora.studio.text import MAX_SEQUENCE_LENGTH, effect_texts

TAPS = (9, 18, 27)
BATCH = 48
LEARNING_RATE = 1e-3
NUM_SENTENCES = 6000
NUM_CHECKED = 256
EFFECT_SHARE = 0.25
TEMPLATE_TOKENS = 3

Meaning = tuple[str, str, str, str]
"""The kind of edit or effect, and up to three words from the slots of a prompt."""


def draw_sentences(seed: int, count: int, photographs: Photographs | None = None) -> list[tuple[str, Meaning]]:
    """Draws prompts of general edits and, one in four, of effects, each with its meaning."""
    rng = np.random.default_rng([seed, 8])
    sentences = []
    for _ in range(count):
        if rng.random() < EFFECT_SHARE:
            effect = EFFECTS[str(rng.choice(list(EFFECTS)))]
            text = str(rng.choice(effect_texts(effect)))
            sentences.append((text, (f"effect {effect.name}", "", "", "")))
        else:
            scene = make_scene(int(rng.integers(1 << 30)), min_objects=1, photographs=photographs)
            edit = sample_edit(scene, rng, str(rng.choice(list(FAMILIES))), photographs=photographs)
            # The first slot may hold a colour and a shape, or the noun of a cut-out, of one word or more.
            first, _, second = edit.slots[0].partition(" ")
            if first not in COLOURS:
                first, second = edit.slots[0], ""
            sentences.append((edit.instruction, (edit.family, first, second, edit.slots[1])))
    return sentences


def train_text_encoder(
    encoder,
    tokenizer,
    updates: int,
    seed: int,
    report: Callable[[int, dict[str, float]], None],
    photographs: Photographs | None = None,
) -> float:
    """Trains the encoder in place and freezes it; ``report(update, {"loss": ...})`` after each update.

    The reading is asked for at the last tokens and all of the padding, which the transformer sees too.

    Returns:
        The share of held-out sentences that are read wholly right at the last position.
    """
    texts, meanings = zip(*draw_sentences(seed, NUM_SENTENCES + NUM_CHECKED, photographs), strict=True)
    tokens, mask = (tensor.to(encoder.device) for tensor in tokenize(tokenizer, texts))
    # The four parts of a meaning, [N, 4]; a part's values are numbered apart from those of the others.
    parts = [np.unique(part, return_inverse=True)[1] for part in zip(*meanings, strict=True)]
    labels = torch.from_numpy(np.stack(parts, axis=1)).to(encoder.device)
    width = len(TAPS) * encoder.config.hidden_size
    heads = nn.ModuleList(nn.Linear(width, int(column.max()) + 1) for column in labels.T).to(encoder.device)
    parameters = [*encoder.train().requires_grad_(True).parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * rate_factor(update, updates, warmup=30, decay=0.4)
        rows = torch.randint(NUM_SENTENCES, (BATCH,), generator=generator)
        loss = _reading_loss(heads, taps(encoder, tokens[rows], mask[rows]), mask[rows], labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        report(update + 1, {"loss": float(loss.detach())})
    encoder.eval().requires_grad_(False)
    with torch.no_grad():
        states = taps(encoder, tokens[NUM_SENTENCES:], mask[NUM_SENTENCES:])[:, -1]
        read = torch.stack([head(states).argmax(-1) for head in heads], dim=1)
    return float((read == labels[NUM_SENTENCES:]).all(1).float().mean())


def tokenize(tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Returns token ids and attention mask ``[N, 64]``, as the pipeline makes them."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for text in texts
    ]
    batch = tokenizer(chats, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def taps(encoder, tokens: Tensor, mask: Tensor) -> Tensor:
    """Returns the pipeline's input to the transformer: three layers side by side, ``[B, 64, 96]``."""
    output = encoder.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return torch.cat([output.hidden_states[i] for i in TAPS], dim=-1)


def _reading_loss(heads: nn.ModuleList, states: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    # Padding is on the right: counted from the left, the mask's sum is reached at the last token and stays.
    after = mask.cumsum(1) >= mask.sum(1, keepdim=True) - TEMPLATE_TOKENS
    weight = after / after.sum(1, keepdim=True)
    loss = 0
    for head, label in zip(heads, labels.T, strict=True):
        scores = head(states).transpose(1, 2)
        everywhere = label[:, None].expand(-1, states.shape[1])
        loss = loss + nn.functional.cross_entropy(scores, everywhere, reduction="none")
    return (loss * weight).sum(1).mean()
