"""The requests to a language model, and the templates that stand in for what it does not answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import NamedTuple

from PIL.Image import Image

from clora.commands.prompts.writers import Request, Writer, distinct, sentences
from clora.config.everyday import everyday_instructions, everyday_topics

Fitting = Callable[[list[str]], list[str]]
"""Keeps those of some texts that are short enough for the text encoder."""

TEMPLATES = "templates"
TRIES = 3
"""Answers that are asked for before templates fill up."""

# None adds anything to the prompt.
_TEMPLATES = (
    "edit the picture: {}",
    "the same picture, but {}",
    "change this picture as follows: {}",
    "apply this effect to the picture: {}",
    "please {}",
    "the picture after this edit: {}",
    "take the picture and {}",
)


class Written(NamedTuple):
    """Texts, who wrote them, and the reason why not only the language model did; None where it did, or was not wanted."""

    texts: list[str]
    by: str
    reason: str | None


def templates(prompt: str) -> list[str]:
    """Words a prompt in several ways without a language model; the first is the prompt."""
    return [prompt, *(template.format(prompt.strip().rstrip(".")) for template in _TEMPLATES)]


def effect_request(prompt: str, pairs: Sequence[tuple[Image, Image]], count: int) -> Request:
    """Asks for descriptions of an effect.

    Args:
        prompt: the teacher's own prompt.
        pairs: pictures before and after it; none for a writer that reads only text.
        count: number of descriptions.
    """
    rules = (
        f"Answer with {count} sentences and nothing else, each on its own line, each of at most 30 words, in the language "
        "of the instruction."
    )
    if not pairs:
        return [
            f'This is an instruction to an image editor: "{prompt}"\n'
            f"Say the same in {count} different ways. Keep the meaning and every detail, invent nothing. {rules}"
        ]
    shown: Request = ["An image editor applies one visual effect to any picture."]
    for number, (before, after) in enumerate(pairs, 1):
        shown += [f"Example {number}, before:", before, f"Example {number}, after:", after]
    return [
        *shown,
        f'It was asked with: "{prompt}"\n'
        f"Describe in {count} different ways what the effect does: its colours, lines, light, texture and material. Speak "
        f"of the effect alone, not of what these pictures happen to show. {rules}",
    ]


def general_request(topic: str, examples: Sequence[str], count: int) -> Request:
    """Asks for everyday edits about a topic, such as the examples."""
    shown = "\n".join(examples)
    return [
        f"People ask an image editor for everyday changes. Some that are about {topic}:\n{shown}\n"
        f"Write {count} more about {topic}, all different, that fit many pictures. Answer with {count} short instructions "
        "and nothing else, each on its own line, each of at most 15 words."
    ]


def write_texts(writer: Writer, request: Request, count: int, seed: str, fitting: Fitting) -> Written:
    """Asks until there are enough usable texts, at most `TRIES` times; if there are fewer, the reason is returned too.

    Args:
        writer: the language model; whatever it raises becomes a reason.
        request: the request.
        count: texts that are wanted.
        seed: of its random numbers, any text.
        fitting: see `Fitting`.
    """
    texts: list[str] = []
    for attempt in range(TRIES):
        # A seed from a text: each effect has its own, whatever the other effects are.
        number = int.from_bytes(hashlib.sha256(f"{seed}/{attempt}".encode()).digest()[:4], "big")
        try:
            answer = writer.answer(request, number)
        except Exception as error:  # generation may raise anything: out of memory, a template's own error, NaN
            return Written(texts, writer.name, f"{writer.name} failed: {type(error).__name__}: {error}")
        # A later answer adds to the usable texts of those before it.
        texts = distinct([*texts, *fitting(sentences(answer))])[:count]
        if len(texts) == count:
            return Written(texts, writer.name, None)
    return Written(texts, writer.name, f"{len(texts)} of {count} usable from {writer.name} in {TRIES} answers")


def describe_effect(
    writer: Writer | None, prompt: str, pairs: Sequence[tuple[Image, Image]], count: int, seed: str, fitting: Fitting
) -> Written:
    """Describes an effect in ``count`` wordings; templates where there is no writer or too few of its texts are usable."""
    written = Written([], TEMPLATES, None)
    if writer is not None:
        request = effect_request(prompt, pairs if writer.sees_pictures else (), count)
        written = write_texts(writer, request, count, seed, fitting)
    return _filled(written, templates(prompt), count)


def write_general(writer: Writer, count: int, seed: str, fitting: Fitting) -> Iterator[Written]:
    """Asks for everyday edits, about one topic of `everyday_topics` at each step, until an answer has none."""
    # Each topic's share, rounded up; `join_general` cuts the rest.
    each = -(-count // len(everyday_topics()))
    for topic, examples in everyday_topics().items():
        written = write_texts(writer, general_request(topic, examples[:3], each), each, f"{seed}/{topic}", fitting)
        yield written
        if not written.texts:  # the other topics would fail too, after three answers each
            return


def join_general(parts: Sequence[Written], count: int) -> Written:
    """Mixes the instructions of all topics and fills them up with those that ship."""
    mixed = chain.from_iterable(zip_longest(*(part.texts for part in parts)))
    texts = distinct(text for text in mixed if text is not None)[:count]
    reason = next((part.reason for part in parts if part.reason is not None), None)
    return _filled(Written(texts, parts[0].by if parts else TEMPLATES, reason), everyday_instructions(), count)


def _filled(written: Written, spare: Sequence[str], count: int) -> Written:
    """Up to ``count`` texts, with templates after those of the writer where these are too few."""
    texts = distinct([*written.texts, *spare])[:count]
    added = len(texts) - len(written.texts)
    by = written.by if not added else f"{written.by} and, for {added}, templates" if written.texts else TEMPLATES
    too_few = f"{len(texts)} of {count}: there are no more templates" if len(texts) < count else None
    return Written(texts, by, written.reason or too_few)
