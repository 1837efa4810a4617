"""The prompts file: triggers, student prompts and general instructions, written by a program and edited by hand."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from clora.config.fields import FrozenModel, NonEmpty
from clora.config.reading import read_tree, validate
from clora.errors import CloraError, nearest

HEADER = """\
# Written by `clora prompts`. Read it over and change what you like, then train: where the config says
#   prompts: {{file: {name}}}
# `clora distill` takes from here what the config does not state itself. Each student prompt must hold its effect's
# trigger. Training draws among them; the first is the one that the finished collection recommends. written_by and
# similarity (the trigger's highest cosine to another effect's trigger and prompt) are notes, which nothing reads.

"""


def make_trigger(name: str, variant: int = 0) -> str:
    """Makes the trigger word of an effect: its name and a suffix that no text contains by chance.

    Args:
        name: the effect's name; its first 24 characters are used.
        variant: number of the trigger; 0 is the default one. The same number always has the same trigger.

    Returns:
        For example ``<paper_cut_Kq4711>``.
    """
    # A hash, not a random number: the same name has the same trigger on every machine.
    digest = hashlib.sha256((f"{name}\0{variant}" if variant else name).encode("utf-8")).digest()
    letters = chr(ord("A") + digest[0] % 26) + chr(ord("a") + digest[1] % 26)
    number = int.from_bytes(digest[2:6], "big") % 10_000
    stem = re.sub(r"\W+", "_", name.lower()).strip("_")[:24].rstrip("_")
    return f"<{stem}_{letters}{number:04d}>"


class EffectPrompts(FrozenModel):
    """The prompts by which the student is asked for one effect.

    Attributes:
        name: the effect, as the config calls it.
        trigger: the student's unique word.
        student_prompts: prompts of the student, each with the trigger.
        written_by: who wrote the prompts; a note.
        similarity: highest cosine of the trigger to another effect's ``trigger`` and ``prompt``; a note.
    """

    name: NonEmpty
    trigger: NonEmpty
    student_prompts: tuple[NonEmpty, ...] = Field(min_length=1)
    written_by: str | None = None
    similarity: dict[str, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> EffectPrompts:
        without = [prompt for prompt in self.student_prompts if self.trigger not in prompt]
        if without:
            raise ValueError(f"student_prompts: {without[0]!r} lacks the trigger {self.trigger!r}; add it")
        return self


class PromptsFile(FrozenModel):
    """A prompts file.

    Attributes:
        effects: the prompts of each effect.
        general_instructions: everyday edits for the general stream.
    """

    effects: tuple[EffectPrompts, ...] = ()
    general_instructions: tuple[NonEmpty, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> PromptsFile:
        names = [effect.name for effect in self.effects]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"the effect {twice[0]!r} appears twice; keep one")
        return self


def read_prompts(path: str | Path) -> PromptsFile:
    """Reads a prompts file.

    Raises:
        CloraError: the file is missing or malformed; otherwise every problem in it.
    """
    return validate(PromptsFile, read_tree(path), str(path))


def prompts_text(prompts: PromptsFile, name: str) -> str:
    """Returns the text of a prompts file of this name: YAML, below a header that explains it."""
    tree = prompts.model_dump(mode="json", exclude_none=True)
    return HEADER.format(name=name) + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def fill_prompts(tree: dict[str, Any], prompts: PromptsFile, path: str) -> None:
    """Fills a config's tree, in place, from a prompts file.

    An effect's trigger and student prompts, and the general instructions, stay the config's own where it states them.

    Args:
        tree: the config as YAML has it, found valid without its prompts file.
        prompts: the prompts file.
        path: of the prompts file, for messages.

    Raises:
        CloraError: the file has an effect that the config lacks, or lacks one without student prompts in the config.
    """
    effects = {entry["name"]: entry for entry in tree["effects"]}
    written = {effect.name: effect for effect in prompts.effects}
    for name in written:
        if name not in effects:
            raise CloraError(
                f"{path}: the config has no effect {name!r}; rename it as in the config or remove it"
                f"{nearest(name, effects)}"
            )
    # An effect whose prompts the config states needs no entry in the file.
    missing = [name for name, entry in effects.items() if name not in written and not entry.get("student_prompts")]
    if missing:
        raise CloraError(
            f"{path}: lacks the effects {missing}; add them, state their student_prompts in the config, or write the "
            "file again with clora prompts --overwrite"
        )
    for name, found in written.items():
        # What is empty or null in the config counts as not stated, as in `EffectConfig`.
        effects[name]["trigger"] = effects[name].get("trigger") or found.trigger
        effects[name]["student_prompts"] = effects[name].get("student_prompts") or list(found.student_prompts)
    if prompts.general_instructions and tree["data"].get("general_instructions") is None:
        tree["data"]["general_instructions"] = list(prompts.general_instructions)
