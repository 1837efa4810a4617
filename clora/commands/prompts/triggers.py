"""Trigger words that resemble one another and other effects' prompts least, measured in the text encoder's space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from clora.models.conditioning import Text

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to unit vectors ``[N, D]``, whose products are similarities."""


@dataclass(frozen=True)
class Similarity:
    """What a trigger resembles most, by cosine; None where there is nothing to compare it with.

    Attributes:
        trigger: highest cosine to another effect's trigger, and that effect's name.
        prompt: highest cosine to a prompt of another effect, and that effect's name.
    """

    trigger: tuple[float, str] | None
    prompt: tuple[float, str] | None


def text_space(encode: Callable[[Sequence[str]], Text], reference: Sequence[str], batch_size: int = 16) -> Embed:
    """The space in which texts are compared: the mean of a text's token embeddings, less that of ordinary texts.

    The mean over all tokens that count, since the transformer attends to all of them; a last token means the whole text
    only in causal encoders. Without the tokens at the start that are the same in every text (the chat template's, an
    image's), which would weigh the more, the shorter a text is. Less the mean of the reference texts, since what every
    prompt shares (the huge channels of language models, which alone bring all raw cosines near 1) tells nothing apart.

    Args:
        encode: the adapter's prompt encoder.
        reference: ordinary texts, two or more, which are 0 on average.
        batch_size: texts per call of ``encode``, whose result may be large.
    """
    start = num_shared_tokens(encode(list(reference[:batch_size])))

    def pooled(texts: Sequence[str]) -> Tensor:
        chunks = [list(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        return torch.cat([mean_of_tokens(encode(chunk), start) for chunk in chunks])

    centre = pooled(reference).mean(0)
    return lambda texts: functional.normalize(pooled(texts) - centre, dim=-1)


def num_shared_tokens(text: Text) -> int:
    """How many tokens at the start all rows have in common, up to rounding (1 % of a token's norm)."""
    embeds = text.embeds.float()
    apart = (embeds - embeds[:1]).norm(dim=-1) > 0.01 * embeds[:1].norm(dim=-1)
    return int(apart.any(0).int().argmax())


def mean_of_tokens(text: Text, start: int = 0) -> Tensor:
    """``[B, D]`` float32, over the tokens from ``start`` on that the mask lets through."""
    embeds = text.embeds[:, start:].float()
    if text.mask is None:
        return embeds.mean(1)
    mask = text.mask[:, start:].to(embeds)[..., None]
    return (embeds * mask).sum(1) / mask.sum(1).clamp(min=1)


def choose_triggers(candidates: Sequence[Sequence[str]], prompts: Sequence[str], embed: Embed) -> list[str]:
    """One trigger per effect, chosen greedily: each the least similar to those chosen before and to others' prompts.

    Effects with a single candidate come first, then the others in their order; of equals the first candidate.

    Args:
        candidates: triggers to choose from, for each of E effects.
        prompts: E prompts, one of each effect.
        embed: see `text_space`.
    """
    vectors = [embed(own) for own in candidates]
    prompt_vectors = embed(prompts)
    chosen: dict[int, int] = {}
    for effect in sorted(range(len(candidates)), key=lambda i: len(candidates[i]) > 1):
        others = [vectors[i][k] for i, k in chosen.items()]
        others += [vector for i, vector in enumerate(prompt_vectors) if i != effect]
        chosen[effect] = _least_similar(vectors[effect], others)
    return [candidates[i][chosen[i]] for i in range(len(candidates))]


def _least_similar(vectors: Tensor, others: Sequence[Tensor]) -> int:
    """The row of ``vectors [K, D]`` whose highest cosine to the others is lowest."""
    return int((vectors @ torch.stack(list(others)).T).amax(1).argmin()) if others else 0


def similarities(
    names: Sequence[str], triggers: Sequence[str], prompts: Sequence[Sequence[str]], embed: Embed
) -> list[Similarity]:
    """What each effect's trigger resembles most.

    Args:
        names: E effects.
        triggers: E triggers.
        prompts: the prompts of each effect, without its trigger.
        embed: see `text_space`.
    """
    vectors = embed(triggers)
    owner = torch.tensor([i for i, own in enumerate(prompts) for _ in own])
    to_triggers = vectors @ vectors.T
    to_prompts = vectors @ embed([prompt for own in prompts for prompt in own]).T
    own = torch.arange(len(names))

    def nearest(cosines: Tensor, effects: Tensor, effect: int) -> tuple[float, str] | None:
        others = torch.nonzero(effects != effect).flatten()
        if not len(others):
            return None
        best = others[cosines[effect, others].argmax()]
        return round(float(cosines[effect, best]), 3), names[int(effects[best])]

    return [Similarity(nearest(to_triggers, own, i), nearest(to_prompts, owner, i)) for i in range(len(names))]
