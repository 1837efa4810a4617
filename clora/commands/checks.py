"""Everything that can be found wrong before anything heavy is loaded, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clora.collection.write import check_output
from clora.config.reading import named_files, read_tree
from clora.config.settings import DistillConfig, general_instructions
from clora.data.images import check_image, list_images
from clora.data.prepare import check_pairs, num_shared
from clora.devices import find_device
from clora.errors import CloraError, about
from clora.files import user_path
from clora.flow.matching import student_schedule
from clora.flow.objective import TAU_BOUNDS, target_simulation_steps
from clora.lora.load import lora_ranks
from clora.lora.source import open_lora
from clora.models import ModelAdapter
from clora.models.common import check_lengths
from clora.training.student import student_layers

Shapes = Mapping[str, tuple[int, int]]


class Problems(list[str]):
    """Messages, each of one problem."""

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keeps the message of a CloraError that is raised inside."""
        try:
            yield
        except CloraError as error:
            self.append(str(error))

    def refuse(self) -> None:
        """Raises CloraError with all messages, if there are any."""
        if len(self) == 1:
            raise CloraError(self[0])
        if self:
            raise CloraError("\n".join([f"{len(self)} problems", *(f"  {problem}" for problem in self)]))


def find_file_problems(config: DistillConfig) -> Problems:
    """What is wrong with the pictures, the LoRA files as such, the instructions, the output folder and the device."""
    problems = Problems()
    for check in (check_exportable, num_shared, check_pairs):
        with problems.catch():
            check(config)
    problems += _named_problems(config.model_dump(mode="json"))
    with problems.catch():
        general_instructions(config.data)
    with problems.catch():
        check_output(config.output)
    with problems.catch():
        find_device(config.device)
    return Problems(dict.fromkeys(problems))


def add_file_problems(error: CloraError, path: str | Path, overrides: Iterable[str]) -> CloraError:
    """What is wrong with a config that is refused, and with the pictures and LoRA files that it names all the same."""
    try:
        found = _named_problems(read_tree(path, overrides))
    except CloraError:  # nothing can be read of it, as the error says
        return error
    heading = ["and of the files that it names:"] if found else []
    return CloraError("\n".join([str(error), *heading, *(f"  {problem}" for problem in found)]))


def _named_problems(tree: Mapping[str, Any]) -> Problems:
    """What is wrong with the pictures and LoRA files that a config's tree names, each folder told of once."""
    problems, seen = Problems(), set()
    for setting, path in named_files(tree).items():
        is_lora = setting.endswith(".lora")
        with problems.catch(), about(setting):
            if is_lora:
                open_lora(path)
            for file in [] if is_lora or path in seen else list_images(user_path(path)):
                with problems.catch(), about(setting):
                    check_image(file)
        seen.add(path)
    return problems


def find_prompt_problems(config: DistillConfig, adapter: ModelAdapter) -> Problems:
    """What is wrong with prompts for this model, with or without weights."""
    problems = Problems()
    for prompt in _prompts(config):
        with problems.catch():
            check_lengths(adapter, [prompt])
    return problems


def find_layer_problems(
    config: DistillConfig, transformer: Any, shapes: Shapes
) -> tuple[Problems, dict[str, dict[str, int]]]:
    """What is wrong with targets and teachers for this model.

    Args:
        config: the settings.
        transformer: with or without weights.
        shapes: its `clora.lora.layers.linear_shapes`.

    Returns:
        The problems, and of each teacher that can be used the rank of its modules.
    """
    problems, ranks = Problems(), {}
    with problems.catch():
        student_layers(transformer, config.student.targets)
    for i, effect in enumerate(config.effects):
        with problems.catch(), about(f"effects.{i}.lora"):
            ranks[effect.name] = lora_ranks(effect.lora, shapes)
    return problems, ranks


def _prompts(config: DistillConfig) -> list[str]:
    asked = [prompt for effect in config.effects for prompt in (effect.prompt, *effect.student_prompts)]
    try:
        return list(dict.fromkeys([*asked, *general_instructions(config.data)]))
    except CloraError:  # told among the files' problems
        return list(dict.fromkeys(asked))


def check_exportable(config: DistillConfig) -> None:
    """Refuses, before anything is rendered, settings whose result no stock pipeline could run."""
    sampler = config.sampler
    if config.objective.target_simulation:
        sigmas = student_schedule(sampler.steps, sampler.shift)
        target_simulation_steps(sigmas, TAU_BOUNDS[config.objective.tau_rule].tau_max)
