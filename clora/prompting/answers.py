"""What a small language model answers, to a list of clean sentences. Nothing here raises: what cannot be used is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

MAX_CHARACTERS = 400  # longer is no description but an essay

_BULLET = re.compile(r"^(?:[-*•–—‣·>#+]+\s+|\(?\d{1,3}[.):]\)?\s+)")
_LABEL = re.compile(
    r"^(?:the |a )?(?:prompt|description|paraphrase|instruction|sentence|version|option|variant|answer|rewording|output)s?"
    r"\s*#?\d*\s*[:.–-]\s+",
    re.IGNORECASE,
)
_TALK = re.compile(
    r"^(?:sure\b|certainly\b|of course\b|okay\b|here (?:are|is)\b|here's\b|note:|i hope\b|i can\b|i'm\b|as an ai\b)",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "‘": "’", "«": "»", "「": "」"}
# A number that starts a new entry within a line: after the end of a sentence.
_INLINE_NUMBER = re.compile(r"(?<=[.!?;\"”])\s+(?=\(?\d{1,2}[.)]\s)")


def sentences(answer: str) -> list[str]:
    """The texts that an answer lists, in order, each once.

    Thinking, code fences, bullets, numbers, labels, quotes and emphasis are stripped; JSON lists are read. Left out are
    talk (``Sure! Here are four:``), fragments, unreadable characters, anything over 400 characters, and anything with a
    word in angle brackets, which could pass for a trigger.
    """
    cleaned = (_clean(entry) for entry in _entries(_without_thinking(answer)))
    return distinct(text for text in cleaned if _is_usable(text))


def distinct(texts: Iterable[str]) -> list[str]:
    """Each text once; letter case and punctuation make no difference."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(re.sub(r"\W+", " ", text.casefold()).strip(), text)
    return list(first.values())


def _without_thinking(answer: str) -> str:
    """An end without a beginning ends what the chat template began; a beginning without an end was cut off."""
    start, end = answer.find("<think>"), answer.find("</think>")
    if end >= 0 and not 0 <= start < end:
        answer = answer[end + len("</think>") :]
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", answer, flags=re.DOTALL)


def _entries(text: str) -> Iterator[str]:
    listed = _listed_in_json(text)
    lines = (line for line in text.splitlines() if not line.strip().startswith("```"))
    yield from listed or (entry for line in lines for entry in _INLINE_NUMBER.split(line))


def _listed_in_json(text: str) -> list[str]:
    """The strings of a JSON list, of one that is not quite JSON too (a comma too many, cut off); none of other texts."""
    listed = text[text.find("[") : text.rfind("]") + 1]
    try:
        return list(_strings(json.loads(listed)))
    except (ValueError, RecursionError):
        is_json = re.match(r"\s*(?:```\w*\s*)?[\[{]", text)
        return re.findall(r'"([^"]*)"', text) if is_json else []


def _strings(tree: Any) -> Iterator[str]:
    """The strings in a JSON tree; keys are left out."""
    if isinstance(tree, str):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _strings(branch)


def _clean(entry: str) -> str:
    text, before = " ".join(re.sub(r"<\|.*?\|>|(?<=\S)\*|\*(?=\S)|__|`", "", entry).split()), None
    while text != before:  # a number may stand in quotes, a quote behind a number
        before = text
        text = _LABEL.sub("", _BULLET.sub("", text)).strip().removesuffix(",").strip(" _")
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
            text = text[1:-1].strip()
    return text


def _is_usable(text: str) -> bool:
    letters = sum(character.isalpha() for character in text)
    several_words = letters >= 6 and (len(text.split()) > 1 or not text.isascii())  # some languages have no spaces
    readable = text.isprintable() and "\ufffd" not in text and letters >= 0.6 * len(text.replace(" ", ""))
    whole = text.count('"') % 2 == 0 and not text.endswith(":") and len(text) <= MAX_CHARACTERS
    return several_words and readable and whole and not _TALK.match(text) and not re.search(r"<\S+>", text)
