"""Everything that can be found wrong before anything heavy is loaded, reported all at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from clora.bank.graphs import check_graphs_on
from clora.collection.write import check_output
from clora.commands.tracking import find_tracker
from clora.config.reading import apply_overrides, named_files, read_tree
from clora.config.settings import DistillConfig, general_instructions
from clora.data.images import check_image, list_images
from clora.data.prepare import check_pairs, num_shared
from clora.devices import find_device
from clora.errors import CloraError, about, listed
from clora.files import user_path
from clora.flow.objective import target_simulation_steps
from clora.lora.load import lora_ranks
from clora.lora.source import open_lora
from clora.models import ModelAdapter
from clora.models.common import check_lengths
from clora.ops import check_choices
from clora.training.student import student_layers


class Problems(list[str]):
    """Messages, one for each problem; the same one only once."""

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keeps the message of a CloraError that is raised inside."""
        try:
            yield
        except CloraError as error:
            if str(error) not in self:
                self.append(str(error))

    def refuse(self) -> None:
        """Raises CloraError with all messages, if there are any."""
        if len(self) == 1:
            raise CloraError(self[0])
        if self:
            raise CloraError(listed(self))


def find_file_problems(config: DistillConfig) -> Problems:
    """Checks the schedule, the pictures, the LoRA files as such, the instructions, the output folder, device and backend."""
    problems = Problems()
    for check, argument in (
        (_check_schedule, config),
        (num_shared, config),
        (check_pairs, config),
        (general_instructions, config.data),
        (check_output, config.output),
        (_check_apart, config),
        (_check_device, config),
        (find_tracker, config.train.tracker),
    ):
        with problems.catch():
            check(argument)
    _check_named_files(config.model_dump(), problems)
    return problems


def add_file_problems(error: CloraError, path: str | Path, overrides: Iterable[str]) -> CloraError:
    """Adds to the error of a refused config what is wrong with the pictures and LoRA files that the config names."""
    found = Problems()
    with suppress(CloraError):  # of a file that is not YAML, which the error reports
        tree = read_tree(path)
        apply_overrides(tree, overrides)
        _check_named_files(tree, found, user_path(path).parent)
    return CloraError("\n  ".join([f"{error}\nand of the files that it names:", *found])) if found else error


def _check_device(config: DistillConfig) -> None:
    device = find_device(config.device)
    check_choices(device)
    if config.train.cuda_graphs:
        check_graphs_on(device)


def _check_schedule(config: DistillConfig) -> None:
    """Target simulation needs a step of the student's schedule to start from."""
    if config.objective.target_simulation:
        target_simulation_steps(config.sampler.steps)


def _check_apart(config: DistillConfig) -> None:
    """A collection must not be written among the pictures or the files of a LoRA or the pipeline."""
    # A folder above or inside the output folder keeps its files, and `list_images` passes over subfolders.
    # Not Path.resolve, which raises for a link to itself before Python 3.13.
    output = os.path.realpath(user_path(config.output))
    for setting, path in {**named_files(config.model_dump()), "pipeline": config.pipeline}.items():
        if os.path.realpath(user_path(path)) == output:
            raise CloraError(
                f"output: expected a folder of its own, found that of {setting}, {path}; name another folder"
            )


def _check_named_files(tree: Mapping[str, Any], problems: Problems, folder: Path = Path()) -> None:
    """Checks the pictures and LoRA files that a config's tree names (see `named_files`), each folder once."""
    seen = set()
    for setting, path in named_files(tree, folder).items():
        with problems.catch(), about(setting):
            if setting.endswith(".lora"):
                open_lora(path)
            elif path not in seen:
                seen.add(path)
                for file in list_images(user_path(path)):
                    # One damaged picture does not hide the next.
                    with problems.catch(), about(setting):
                        check_image(file)


def check_prompts(config: DistillConfig, adapter: ModelAdapter, problems: Problems) -> None:
    """Checks the length of all prompts for a model, with or without its weights."""
    prompts = []
    for effect in config.effects:
        prompts += [effect.prompt, *effect.student_prompts]
    with suppress(CloraError):  # of a missing file, which `find_file_problems` reports
        prompts += general_instructions(config.data)
    with problems.catch():
        check_lengths(adapter, prompts)


def check_layers(
    config: DistillConfig, transformer: Any, shapes: Mapping[str, tuple[int, int]], problems: Problems
) -> dict[str, dict[str, int]]:
    """Checks that the student's layers and the teachers fit a model.

    Args:
        config: the settings.
        transformer: with or without weights.
        shapes: its `clora.lora.layers.linear_shapes`.
        problems: receives what is wrong.

    Returns:
        Effect to layer to rank, of each teacher that can be used.
    """
    ranks = {}
    with problems.catch():
        student_layers(transformer, config.student.targets)
    for i, effect in enumerate(config.effects):
        with problems.catch(), about(f"effects.{i}.lora"):
            ranks[effect.name] = lora_ranks(effect.lora, shapes, effect.ignore)
    return ranks
