"""Everything that can be found wrong before anything heavy is loaded, all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from clora.config import DistillConfig, general_instructions
from clora.distill import check_exportable, find_device, target_modules
from clora.encoding import check_pairs, num_shared, picture_folders
from clora.errors import CloraError, about
from clora.export import check_output
from clora.images import check_image, list_images
from clora.lora.files import lora_ranks
from clora.lora.source import open_lora
from clora.models import ModelAdapter
from clora.models.common import check_lengths

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
    for folder, setting in picture_folders(config).items():
        with problems.catch(), about(setting):
            for file in list_images(folder):
                with problems.catch(), about(setting):
                    check_image(file)
    for i, effect in enumerate(config.effects):
        with problems.catch(), about(f"effects.{i}.lora"):
            open_lora(effect.lora)
    with problems.catch():
        general_instructions(config.data)
    with problems.catch():
        check_output(config.output)
    with problems.catch():
        find_device(config.device)
    return Problems(dict.fromkeys(problems))


def find_model_problems(
    config: DistillConfig, adapter: ModelAdapter, shapes: Shapes
) -> tuple[Problems, dict[str, dict[str, int]]]:
    """What is wrong with prompts, targets and teachers for this model.

    Args:
        config: the settings.
        adapter: of the pipeline, with or without weights.
        shapes: `clora.lora.files.linear_shapes` of its transformer.

    Returns:
        The problems, and of each teacher that can be used the rank of its modules.
    """
    problems, ranks = Problems(), {}
    with problems.catch():
        target_modules(adapter.pipeline.transformer, config.student.targets)
    for prompt in _prompts(config):
        with problems.catch():
            check_lengths(adapter, [prompt])
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
