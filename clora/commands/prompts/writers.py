"""Language models that write, and the texts that are read from their answers.

A writer is the pipeline's own text encoder where it can generate, or a vision-language model of the user's. Its answers are
not trusted: `sentences` keeps only what can be a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from clora.errors import CloraError
from clora.progress import quiet_libraries

Request = list["str | Image"]
"""Texts and pictures for a writer, in their order."""

MAX_TOKENS = 512
"""Of an answer."""
MAX_SIDE = 512
"""Pixels of a picture; four of 1024 x 1024 would be 5476 tokens of Qwen2.5-VL, these are 1296."""
MAX_CHARACTERS = 400
"""Of a text; what is longer is an essay, no description."""


class Writer(NamedTuple):
    """A language model that answers requests.

    Attributes:
        name: its name in the prompts file.
        sees_pictures: requests may hold pictures.
        answer: ``answer(request, seed)``; the same for the same seed, whatever was drawn before. The global random
            numbers are left as they were.
    """

    name: str
    sees_pictures: bool
    answer: Callable[[Request, int], str]


def pipeline_writer(pipeline) -> Writer | None:
    """Makes a writer of the pipeline's own text encoder; None where it is not a language model that can generate.

    Qwen2.5-VL in Qwen-Image-Edit (``processor``) and LongCat-Image-Edit (``text_processor``) and Mistral 3 in FLUX.2
    [dev], whose ``tokenizer`` is a processor, see pictures. Qwen3 in FLUX.2 [klein] reads only text. CLIP and T5 of
    FLUX.1 and models without a head cannot write.
    """
    model = getattr(pipeline, "text_encoder", None)
    can_generate = getattr(model, "can_generate", None)
    slots = (getattr(pipeline, name, None) for name in ("processor", "text_processor", "tokenizer"))
    processor = next((slot for slot in slots if getattr(slot, "chat_template", None)), None)
    if processor is None or can_generate is None or not can_generate():
        return None
    return language_model_writer(f"{type(model).__name__} of the pipeline", model, processor)


def load_writer(path: str, device: torch.device) -> Writer:
    """Loads a vision-language model of transformers, by folder or hub id, as a writer.

    Raises:
        CloraError: it cannot be loaded, or has no chat template.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    is_folder = Path(path).exists()
    try:
        with quiet_libraries():
            processor = AutoProcessor.from_pretrained(path)
            model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", use_safetensors=True)
    except Exception as error:  # readers of damaged configs, processors and weights raise whatever they meet
        where = "" if is_folder else "; no such folder exists, so it was taken for a hub id"
        raise CloraError(
            f"prompts.writer: {path!r} cannot be loaded as a vision-language model with its processor{where}: {error}"
        ) from error
    if not getattr(processor, "chat_template", None):
        raise CloraError(f"prompts.writer: {path!r} has no chat template; use an instruction-tuned model")
    return language_model_writer(Path(path).name if is_folder else path, model.eval().to(device), processor)


def language_model_writer(name: str, model, processor) -> Writer:
    """Makes a writer of a transformers model that generates and its processor or tokenizer."""
    sees = getattr(processor, "image_processor", None) is not None
    tokenizer = getattr(processor, "tokenizer", processor)
    cuda = [model.device] if model.device.type == "cuda" else []

    def answer(request: Request, seed: int) -> str:
        with quiet_libraries(), torch.random.fork_rng(cuda):
            inputs = {
                key: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for key, value in _inputs(processor, request, sees).items()
            }
            torch.manual_seed(seed)
            # [1, request and answer]; sampled, since a request is repeated where its answer is of no use.
            tokens = model.generate(
                **inputs,
                do_sample=True,
                temperature=0.8,
                top_p=0.9,
                max_new_tokens=MAX_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
            )
        return _decode(tokenizer, tokens[0, inputs["input_ids"].shape[1] :])

    return Writer(name, sees, answer)


def _inputs(processor, request: Request, sees: bool) -> Any:
    """The request as one message of a chat; a tokenizer's template wants a text, a processor's a list of parts."""
    content: Any = "\n".join(part for part in request if isinstance(part, str))
    if sees:
        content = [_part(part) for part in request]
    # Thinking would use up the answer; only a template that knows the word may be given it.
    options = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


def _part(part: str | Image) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    smaller = part.copy()
    smaller.thumbnail((MAX_SIDE, MAX_SIDE))
    return {"type": "image", "image": smaller}


def _decode(tokenizer, answer: torch.Tensor) -> str:
    """The answer's text; where the model was cut off, without its last, unfinished line."""
    text = tokenizer.decode(answer, skip_special_tokens=True)
    return text.rpartition("\n")[0] if len(answer) >= MAX_TOKENS else text


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
    """Returns the texts that an answer lists, in order, each once.

    Thinking, code fences, bullets, numbers, labels, quotes and emphasis are stripped; JSON lists are read. Talk (``Sure!
    Here are four:``), fragments, unreadable characters and anything over 400 characters are left out. So is anything
    with a word in angle brackets, which could pass for a trigger.
    """
    text = _without_thinking(answer)
    entries = _listed_in_json(text)
    if not entries:
        for line in text.splitlines():
            if not line.strip().startswith("```"):
                entries += _INLINE_NUMBER.split(line)
    return distinct(filter(_is_usable, map(_clean, entries)))


def distinct(texts: Iterable[str]) -> list[str]:
    """Returns each text once; letter case and punctuation make no difference."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(re.sub(r"\W+", " ", text.casefold()).strip(), text)
    return list(first.values())


def _without_thinking(answer: str) -> str:
    """The chat template may have begun the thinking, and the answer may be cut off within it."""
    start, end = answer.find("<think>"), answer.find("</think>")
    if end >= 0 and not 0 <= start < end:
        answer = answer[end + len("</think>") :]
    return re.sub(r"<think>.*?(?:</think>|\Z)", "", answer, flags=re.DOTALL)


def _listed_in_json(text: str) -> list[str]:
    """The strings of a JSON list, even with a comma too many or cut off; none of other texts."""
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
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    for branch in branches:
        yield from _strings(branch)


def _clean(entry: str) -> str:
    # Special tokens, emphasis and code marks anywhere, then what stands at the ends.
    text = " ".join(re.sub(r"<\|.*?\|>|(?<=\S)\*|\*(?=\S)|__|`", "", entry).split())
    before = None
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
