"""Trigger words that resemble one another and other effects' prompts least, measured in the text encoder's space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from clora.models import ModelAdapter
from clora.models.conditioning import Text

Embed = Callable[[Sequence[str]], Tensor]
"""Texts to unit vectors ``[N, D]``, whose products are similarities."""


class Similarity(NamedTuple):
    """The nearest neighbours of a trigger, by cosine; None where there is nothing to compare it with.

    Attributes:
        trigger: highest cosine to another effect's trigger, and that effect's name.
        prompt: highest cosine to a prompt of another effect, and that effect's name.
    """

    trigger: tuple[float, str] | None
    prompt: tuple[float, str] | None


def text_space(encode: Callable[[Sequence[str]], Text], reference: Sequence[str], batch_size: int = 16) -> Embed:
    """Makes the space in which texts are compared: the mean of a text's token embeddings, less that of ordinary texts.

    All tokens that count are averaged, since the transformer attends to all of them; a last token stands for the whole
    text only in causal encoders. Tokens at the start that are the same in every text (the chat template's, an image's)
    are left out: in a short text they would weigh most. The mean of the reference texts is subtracted, since what all
    prompts share does not distinguish them: the huge channels of language models bring all raw cosines near 1.

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


def encode_texts(adapter: ModelAdapter, texts: Sequence[str]) -> Text:
    """Encodes prompts, about a grey picture where the family encodes them together with one."""
    grey = [torch.zeros(len(texts), 3, *adapter.size)] if adapter.text_sees_image else None
    return adapter.encode_prompts(texts, grey)


def num_shared_tokens(text: Text) -> int:
    """Counts the tokens at the start that all rows have in common, up to rounding (1 % of a token's norm)."""
    embeds = text.embeds.float()
    # [B, T]: tokens that differ from the first row's. The first column with any of them ends the shared start.
    apart = (embeds - embeds[:1]).norm(dim=-1) > 0.01 * embeds[:1].norm(dim=-1)
    return int(apart.any(0).int().argmax())


def mean_of_tokens(text: Text, start: int = 0) -> Tensor:
    """Averages the tokens from ``start`` on that the mask lets through: ``[B, D]`` float32."""
    embeds = text.embeds[:, start:].float()
    if text.mask is None:
        return embeds.mean(1)
    # [B, T, 1]: a token that the mask hides weighs nothing.
    mask = text.mask[:, start:].to(embeds)[..., None]
    return (embeds * mask).sum(1) / mask.sum(1).clamp(min=1)


def choose_triggers(candidates: Sequence[Sequence[str]], prompts: Sequence[str], embed: Embed) -> list[str]:
    """Chooses one trigger per effect, greedily: the least similar to those chosen before and to others' prompts.

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
        # The candidate [K, D] whose highest cosine to the others [N, D] is lowest.
        chosen[effect] = int((vectors[effect] @ torch.stack(others).T).amax(1).argmin()) if others else 0
    return [candidates[i][chosen[i]] for i in range(len(candidates))]


def similarities(
    names: Sequence[str], triggers: Sequence[str], prompts: Sequence[Sequence[str]], embed: Embed
) -> list[Similarity]:
    """Finds what each effect's trigger resembles most.

    Args:
        names: E effects.
        triggers: E triggers.
        prompts: the prompts of each effect, without its trigger.
        embed: see `text_space`.
    """
    vectors = embed(triggers)
    effects = torch.arange(len(names))
    owner = effects.repeat_interleave(torch.tensor([len(own) for own in prompts]))
    # Cosines of E triggers with each other [E, E] and with the N prompts of all effects [E, N].
    to_triggers = vectors @ vectors.T
    to_prompts = vectors @ embed(list(chain.from_iterable(prompts))).T

    def nearest(cosines: Tensor, owners: Tensor, effect: int) -> tuple[float, str] | None:
        others = torch.nonzero(owners != effect).flatten()
        if not len(others):
            return None
        best = others[cosines[effect, others].argmax()]
        return round(float(cosines[effect, best]), 3), names[int(owners[best])]

    return [Similarity(nearest(to_triggers, effects, i), nearest(to_prompts, owner, i)) for i in range(len(names))]
