"""From a config to its prompts file, and the table of what was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from clora.commands.prompts.examples import NUM_PAIRS, Pairs, given_pairs, rendered_pairs
from clora.commands.prompts.triggers import (
    Embed,
    Similarity,
    choose_triggers,
    encode_texts,
    similarities,
    text_space,
)
from clora.commands.prompts.wording import Written, describe_effect, join_general, write_general
from clora.commands.prompts.writers import Writer, load_writer, pipeline_writer
from clora.config.everyday import everyday_instructions, everyday_topics
from clora.config.prompts_file import EffectPrompts, PromptsFile, make_trigger, prompts_text
from clora.config.settings import DistillConfig, EffectConfig
from clora.data.prepare import check_pairs
from clora.data.rendering import num_passes
from clora.devices import find_device, move, on_device
from clora.errors import CloraError
from clora.files import check_writable, user_path, write_atomic
from clora.lora.load import load_lora
from clora.models import ModelAdapter
from clora.models.loading import load_adapter
from clora.progress import say, stage


class EffectReport(NamedTuple):
    """The choices for one effect.

    Attributes:
        name: the effect.
        trigger: its trigger.
        similarity: what the trigger resembles most.
        written_by: who wrote its prompts.
    """

    name: str
    trigger: str
    similarity: Similarity
    written_by: str


def write_prompts(config: DistillConfig, path: str | Path, overwrite: bool = False) -> list[EffectReport]:
    """Writes triggers, student prompts and general instructions to a file, where the config does not state them.

    Args:
        config: loaded without its prompts file.
        path: the file.
        overwrite: replace an existing file.

    Returns:
        A report for each effect of the config, also for those whose prompts it states.

    Raises:
        CloraError: the file exists, nothing is left to write, or something in the input cannot be used. Failures of the
            language model are not an error: templates stand in, and the reason is reported.
    """
    file = user_path(path)
    if file.exists() and not overwrite:
        raise CloraError(
            f"{file} already exists and may contain your edits; --overwrite replaces it, prompts.file=other.yaml writes another"
        )
    if not any(map(_is_open, config.effects)) and not _wants_general(config):
        raise CloraError("the config states all student_prompts and general_instructions: nothing is left to write")
    check_writable(file.parent)
    device = find_device(config.device)
    with stage("load pipeline", None):
        config, adapter = load_adapter(config)
        for name, part in adapter.pipeline.components.items():
            # The transformer waits on the CPU: at most it renders examples.
            if isinstance(part, nn.Module) and name != "transformer":
                move(part, device)
    writer = _choose_writer(config, adapter.pipeline, device)
    pairs = _pairs(config, adapter, device) if writer is not None and writer.sees_pictures else {}
    with stage("compare triggers", None):
        embed = text_space(lambda texts: encode_texts(adapter, texts), everyday_instructions())
        # Triggers before prompts: a prompt must be short enough with its trigger in front.
        candidates = [_candidates(effect, config.prompts.triggers) for effect in config.effects]
        triggers = choose_triggers(candidates, [effect.prompt for effect in config.effects], embed)
    texts, general = _write(config, adapter, writer, triggers, pairs)
    with stage("compare prompts", None):
        report = _report(config, triggers, texts, embed)
    entries = tuple(_entry(line, texts[line.name]) for line in report if line.name in texts)
    written = PromptsFile(effects=entries, general_instructions=tuple(general.texts) if general is not None else ())
    write_atomic(file, prompts_text(written, str(path)))
    _report_reasons(texts, general)
    return report


def _is_open(effect: EffectConfig) -> bool:
    """The config leaves the effect's student prompts to be written."""
    return "student_prompts" not in effect.model_fields_set


def _wants_general(config: DistillConfig) -> bool:
    return config.objective.dual_stream and config.data.general_instructions is None


def _choose_writer(config: DistillConfig, pipeline, device: torch.device) -> Writer | None:
    """Returns the writer, or None for templates; reports what the pipeline's own writer cannot do."""
    if config.prompts.writer == "templates":
        return None
    if config.prompts.writer != "auto":
        with stage("load writer", None):
            return load_writer(config.prompts.writer, device)
    writer = pipeline_writer(pipeline)
    if writer is None:
        found = type(getattr(pipeline, "text_encoder", None)).__name__
        say(
            f"prompts are made from templates: the pipeline's text encoder ({found}) cannot write; "
            "prompts.writer takes the folder of a vision-language model"
        )
    elif not writer.sees_pictures:
        say(f"{writer.name} reads the teachers' prompts, it sees no pictures")
    return writer


def _pairs(config: DistillConfig, adapter: ModelAdapter, device: torch.device) -> dict[str, Pairs]:
    """Returns pictures before and after each effect whose prompts are to be written."""
    check_pairs(config)
    effects = [effect for effect in config.effects if _is_open(effect)]
    pairs = {effect.name: given_pairs(effect, config.data.size) for effect in effects if effect.targets is not None}
    missing = [effect for effect in effects if effect.targets is None]
    if not missing:
        return pairs
    transformer = adapter.pipeline.transformer
    num_rendered = NUM_PAIRS * len(missing)
    with on_device(transformer, device), stage("render examples", num_passes(config, num_rendered)) as advance:
        for effect in missing:  # one teacher at a time: many would fill the memory
            teacher = load_lora(effect.lora, transformer, max_error=effect.max_error, ignore=effect.ignore)
            pairs[effect.name] = rendered_pairs(config, adapter, effect, teacher, advance)
    return pairs


def _candidates(effect: EffectConfig, count: int) -> list[str]:
    """Triggers to choose from; the config's own where it states the trigger or the prompts that hold it."""
    if not _is_open(effect) or "trigger" in effect.model_fields_set:
        return [effect.trigger]
    return [make_trigger(effect.name, variant) for variant in range(count)]


def _write(
    config: DistillConfig,
    adapter: ModelAdapter,
    writer: Writer | None,
    triggers: Sequence[str],
    pairs: Mapping[str, Pairs],
) -> tuple[dict[str, Written], Written | None]:
    """Returns descriptions of the effects that lack them, and general instructions where the config has none."""
    settings = config.prompts
    wanted = [(e, trigger) for e, trigger in zip(config.effects, triggers, strict=True) if _is_open(e)]
    asks_general = writer is not None and _wants_general(config)
    texts, parts = {}, []
    with stage("write prompts", len(wanted) + asks_general * len(everyday_topics())) as advance:
        for effect, trigger in wanted:
            fitting = partial(_fitting, adapter, before=f"{trigger} ")
            shown = pairs.get(effect.name, ())
            seed = f"{config.seed}/{effect.name}"
            texts[effect.name] = describe_effect(writer, effect.prompt, shown, settings.paraphrases, seed, fitting)
            advance()
        if asks_general:
            for part in write_general(writer, settings.general, f"{config.seed}", partial(_fitting, adapter)):
                parts.append(part)
                advance()
    return texts, join_general(parts, settings.general) if _wants_general(config) else None


def _fitting(adapter: ModelAdapter, texts: list[str], before: str = "") -> list[str]:
    """Keeps the texts that fit ``max_sequence_length`` with ``before`` in front; only the adapter can measure them."""
    if not texts:
        return []
    try:
        encode_texts(adapter, [before + text for text in texts])
        return texts
    except CloraError:
        # One of them is too long: each half is tried by itself, down to single texts.
        half = len(texts) // 2
        return [*_fitting(adapter, texts[:half], before), *_fitting(adapter, texts[half:], before)] if half else []


def _report(
    config: DistillConfig, triggers: Sequence[str], texts: Mapping[str, Written], embed: Embed
) -> list[EffectReport]:
    # The teacher's prompt and the descriptions of each effect, without its trigger.
    prompts = []
    for effect in config.effects:
        stated = [prompt.replace(effect.trigger, "").strip() for prompt in effect.student_prompts]
        prompts.append([effect.prompt, *(texts[effect.name].texts if effect.name in texts else stated)])
    names = [effect.name for effect in config.effects]
    found = similarities(names, triggers, prompts, embed)
    written_by = [texts[name].by if name in texts else "config" for name in names]
    return [EffectReport(*line) for line in zip(names, triggers, found, written_by, strict=True)]


def _entry(line: EffectReport, written: Written) -> EffectPrompts:
    found = line.similarity._asdict()
    return EffectPrompts(
        name=line.name,
        trigger=line.trigger,
        student_prompts=tuple(f"{line.trigger} {text}" for text in written.texts),
        written_by=written.by,
        similarity={key: value[0] for key, value in found.items() if value is not None} or None,
    )


def _report_reasons(texts: Mapping[str, Written], general: Written | None) -> None:
    """Reports why the language model did not write everything; effects with the same reason share a line."""
    shared: dict[str, list[str]] = {}
    for name, written in [*texts.items(), ("general instructions", general)]:
        if written is not None and written.reason is not None:
            shared.setdefault(f"{written.by} ({written.reason})", []).append(name)
    for reason, names in shared.items():
        say(f"{', '.join(names)}: {reason}")


def similarity_table(report: Sequence[EffectReport]) -> Table:
    """Lays out a row per effect: its trigger, who wrote its prompts, and what the trigger resembles most."""
    table = Table(title="similarity in the text encoder's space: cosine, 1 is the same, 0 like any two prompts")
    for column in ("effect", "trigger", "prompts by", "nearest trigger", "nearest prompt"):
        table.add_column(column, overflow="fold")  # a trigger that is cut cannot be typed
    for line in report:
        cells = ("" if found is None else f"{found[0]:.2f} {found[1]}" for found in line.similarity)
        table.add_row(*map(Text, (line.name, line.trigger, line.written_by, *cells)))  # names are not markup
    return table
