"""The configuration of a distillation: frozen models, checked in full before anything is loaded.

Relative paths in a file are relative to its folder, also those of overrides, which stand for lines of the file. In a
`DistillConfig` that a program makes they are relative to the working directory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, model_validator

from clora.config.everyday import everyday_instructions
from clora.config.fields import (
    Count,
    Few,
    FrozenModel,
    NonEmpty,
    NotNegative,
    PathOrHubId,
    PathOrTexts,
    PathText,
    Pixels,
    Positive,
    Rank,
    Reading,
    Share,
    Shift,
    Steps,
    Tokens,
    as_written,
)
from clora.config.presets import merged, read_preset
from clora.config.prompts_file import fill_prompts, make_trigger, read_prompts
from clora.config.reading import apply_overrides, fill_empty_sections, named_files, read_tree, validate
from clora.config.training import ObjectiveConfig, TrainConfig
from clora.errors import CloraError, about, check_device_name
from clora.files import read_text, user_path

ADDED: dict[str, dict[str, Any]] = {
    "data": {"general_pairs": None},
    "objective": {"weighting": "per_term"},
    "train": {
        "schedule": "linear",
        "warmup_updates": 0,
        "weight_decay": 0.0,
        "ema_decay": None,
        "export": "student",
        "compile": False,
        "cuda_graphs": False,
    },
}
"""Settings that earlier versions lacked, and the values that they acted by."""
NEVER_RECORDED = {"train": {"keep_checkpoints", "preview_every", "stop_after", "tracker"}}
"""Settings that no result depends on, and that earlier versions lacked."""


class EffectConfig(FrozenModel):
    """One teacher: a LoRA with the prompt it was trained on, and the prompts by which the student is asked for it.

    Attributes:
        name: the effect's name; unique in a collection.
        lora: LoRA file or folder.
        prompt: the teacher's own training prompt.
        max_error: largest relative error, in any layer, of the factors of a change without low rank (DoRA, full-matrix
            LoKr).
        ignore: the beginnings of tensor names of the LoRA to leave out, such as those of a text encoder; ``*`` stands
            for any text.
        trigger: the student's unique word; by default made from the name (see `make_trigger`).
        student_prompts: prompts of the student, each with the trigger if one is given; by default the trigger followed
            by the teacher's prompt. Without a given trigger they need not hold the
            default one, which then goes unused.
        sources: folder of images to edit; by default those of `DataConfig`.
        targets: folder of results, with the same file names as `sources`; by default the teacher renders them.
    """

    name: NonEmpty
    lora: PathText
    prompt: NonEmpty
    max_error: Share = 0.01
    ignore: tuple[NonEmpty, ...] = ()
    # Pydantic before 2.14 asks for these defaults even where what they are made of is missing, which it reports.
    trigger: NonEmpty = Field(default_factory=lambda data: make_trigger(data.get("name", "missing")))
    student_prompts: tuple[NonEmpty, ...] = Field(
        default_factory=lambda data: (f"{data.get('trigger')} {data.get('prompt')}",)
    )
    sources: PathText | None = None
    targets: PathText | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unset(cls, values: Any) -> Any:
        """An explicit null or empty list means the default, as in a config written by a program."""
        if not isinstance(values, dict):
            return values
        unset = ("trigger", "student_prompts", "ignore")
        values = {k: v for k, v in values.items() if k not in unset or v not in (None, [], ())}
        # After this validator, strict checking accepts only a tuple.
        return {k: tuple(v) if k in unset and isinstance(v, list) else v for k, v in values.items()}

    @model_validator(mode="after")
    def _check(self) -> EffectConfig:
        if self.targets is not None and self.sources is None:
            raise ValueError("targets needs sources: the folder of the images that the targets were made from")
        without = [prompt for prompt in self.student_prompts if self.trigger not in prompt]
        if without and self.trigger != make_trigger(self.name):
            raise ValueError(
                f"student_prompts: {without[0]!r} lacks the trigger {self.trigger!r}; add it or drop trigger"
            )
        return self


class DataConfig(FrozenModel):
    """Images and instructions.

    Attributes:
        sources: folder of images to edit.
        size: height and width in pixels; images are cropped and resized to it.
        max_sequence_length: text tokens per prompt.
        general_instructions: everyday edits for the general stream, or a text file with one on each line; by default a
            list that ships with clora.
        held_out: number of images, the last ones, that are kept out of training.
        sources_per_effect: images that each teacher renders a target for.
        general_targets: general edits that the base renders targets for, so that the general stream is anchored too;
            0, as in the paper, for none.
        general_pairs: most pairs of a picture and an instruction of the general stream without targets; None for all, and
            for 512 where the model encodes each instruction with its picture.
        cache: folder that keeps encoded prompts, images and rendered targets for other runs; None for one in the output
            folder, which is removed when the collection is written.
    """

    sources: PathText
    size: tuple[Pixels, Pixels]
    max_sequence_length: Tokens = 512
    general_instructions: PathOrTexts | None = None
    held_out: Count = 0
    sources_per_effect: Positive = 20
    general_targets: Count = 0
    general_pairs: Positive | None = None
    cache: PathText | None = None


class StudentConfig(FrozenModel):
    """The LoRA that is trained.

    Attributes:
        rank: its rank; alpha is equal.
        init: a zero delta, the mean of the teachers (``merge``), or one fitted to what they do (``least_squares``; method.md 4d).
        targets: suffixes of the names of the layers to adapt; None for all linear layers of the blocks.
    """

    rank: Rank
    init: Literal["zero", "merge", "least_squares"] = "zero"
    targets: tuple[NonEmpty, ...] | None = None


class SamplerConfig(FrozenModel):
    """Sampling of student and teachers.

    Attributes:
        steps: passes of the student.
        shift: time shift of the student's schedule, and of the noise levels of training. Teachers render by the pipeline's own.
        teacher_steps: steps of a teacher that renders targets.
        guidance: guidance w of the teachers that score, by a second pass with the empty prompt; 0 for none (pipelines
            call w + 1 the guidance scale, or the true CFG scale). None for the family's default: the paper's 4 for
            FLUX.2 [klein] and Qwen-Image-Edit, 0 for families with a guidance embedding.
        teacher_guidance: guidance w of the teachers that render targets; ``stock`` is that of a stock call of the
            family's pipeline. By default `guidance` where that is given, else ``stock``.
        teacher_norm_rescale: rescale guided predictions of targets to the norm of the conditional one. None for what a
            stock call does where `teacher_guidance` is ``stock``, else for ``objective.norm_rescale``.
        guidance_embedding: guidance scale that student, critic and teachers all receive in every pass, where the
            family has a guidance embedding; None for that of a stock call.
    """

    steps: Steps = 8
    shift: Shift = 3.0
    teacher_steps: Steps = 40
    guidance: NotNegative | None = None
    teacher_guidance: NotNegative | Literal["stock"] = Field(
        default_factory=lambda data: "stock" if data["guidance"] is None else data["guidance"]
    )
    teacher_norm_rescale: bool | None = None
    guidance_embedding: NotNegative | None = None

    @property
    def passes_per_teacher_step(self) -> int:
        """One pass with the teacher's prompt and, with guidance, one with the empty prompt."""
        # What the family decides counts as guided, before the family is known.
        return 1 if self.teacher_guidance == 0 else 2

    @property
    def rows_per_scored_sample(self) -> int:
        """One of the critic's, and the teacher's with its prompt and, with guidance, with the empty prompt."""
        return 2 if self.guidance == 0 else 3


class PromptsConfig(FrozenModel):
    """Prompts that `clora prompts` writes to a file, to be edited before training (docs/prompts.md).

    Attributes:
        file: that file. `load_config` takes from it what `effects` and `data` leave out.
        writer: ``auto`` is the pipeline's own language model where it can generate, otherwise templates; ``templates``;
            or folder or hub id of a vision-language model of transformers.
        paraphrases: student prompts per effect.
        triggers: candidates that an effect's trigger is chosen from.
        general: instructions of the general stream.
    """

    file: PathText | None = None
    writer: PathOrHubId = "auto"
    paraphrases: Few = 4
    triggers: Few = 8
    general: Few = 96


class DistillConfig(FrozenModel):
    """Everything that a distillation needs.

    Attributes:
        pipeline: folder or hub id of the pipeline that the teachers were trained on.
        output: folder for the result.
        effects: the teachers.
        data: images and instructions.
        student: the LoRA that is trained.
        sampler: sampling of student and teachers.
        objective: the method.
        train: the training settings, at least `updates`.
        prompts: writing of prompts; it does not affect training, so it is left out when a config is dumped.
        seed: every random number follows from it.
        device: ``auto``, ``cpu``, ``mps``, ``cuda`` or ``cuda:0``. On a CPU a training takes as many threads as cores are free
            when it begins. A run that goes on keeps them, unless the user has set a number (``OMP_NUM_THREADS``).
        dtype: of the pipeline's weights and of the arithmetic in it. ``auto`` is bfloat16 on CUDA and on CPUs with AMX, else
            float32; a run keeps what it began with. LoRAs, optimizer and losses are float32 in any case.
    """

    pipeline: PathOrHubId
    output: PathText
    effects: tuple[EffectConfig, ...] = Field(min_length=1)
    data: DataConfig
    student: StudentConfig
    sampler: SamplerConfig = SamplerConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig
    prompts: PromptsConfig = Field(default=PromptsConfig(), exclude=True)
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def recorded(self, **chosen: Any) -> dict[str, Any]:
        """Returns the settings as checkpoints and collections record, compare and hash them.

        Args:
            chosen: ``include`` or ``exclude`` of pydantic's ``model_dump``.
        """
        settings = self.model_dump(mode="json", **chosen)
        # A run that does what an earlier version did has that version's record.
        for section, values in ADDED.items():
            found = settings.get(section, {})
            for key, value in values.items():
                if found.get(key) == value:
                    found.pop(key, None)
        # Earlier versions rendered with what they scored with.
        sampler = self.sampler
        is_rescaled_alike = sampler.teacher_norm_rescale in (None, self.objective.norm_rescale)
        if sampler.teacher_guidance == sampler.guidance and is_rescaled_alike:
            for key in ("teacher_guidance", "teacher_norm_rescale"):
                settings["sampler"].pop(key)
        for section, keys in NEVER_RECORDED.items():
            for key in keys:
                settings.get(section, {}).pop(key, None)
        # Chosen rows change the last digits only, as none did before there was a choice.
        if settings.get("train", {}).get("gradient_rows") == "auto":
            settings["train"]["gradient_rows"] = None
        for effect in settings.get("effects", ()):
            if not effect.get("ignore"):
                effect.pop("ignore", None)
        settings["sampler"]["integer_timesteps"] = False
        # It chose noise levels of target simulation; only runs without that are the same as before.
        if "objective" in settings and not self.objective.target_simulation:
            settings["objective"]["tau_rule"] = "paper"
        return settings

    @property
    def anchor_share(self) -> float:
        """The share of the run with trajectory anchoring only; 0 where that is off."""
        objective = self.objective
        # A weight of 0 switches anchoring off as its own switch does.
        anchored = objective.trajectory_anchoring and objective.weights.trajectory_anchoring > 0
        return self.train.anchor_share if anchored else 0.0

    def shares_prediction(self, gradient_rows: int | None) -> bool:
        """Reports whether one pass of the student serves its last critic's update and its own.

        Its graph waits while the critic learns: the rows of both must fit these.
        """
        has_room = gradient_rows is None or 2 * self.train.batch_size <= gradient_rows
        return self.objective.backward_simulation and has_room

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> DistillConfig:
        check_device_name(self.device)
        unique: dict[str, Counter[str]] = {"name": Counter(effect.name for effect in self.effects)}
        # A prompts file that is yet to be read may replace default triggers and prompts.
        if info.context is None or info.context.is_filled:
            unique["trigger"] = Counter(effect.trigger for effect in self.effects)
            # One effect may repeat its own prompt; two effects cannot share one.
            prompts = chain.from_iterable(set(effect.student_prompts) for effect in self.effects)
            unique["student prompt"] = Counter(prompts)
        for setting, counts in unique.items():
            twice = [value for value, count in counts.items() if count > 1]
            if twice:
                raise ValueError(f"two effects have the {setting} {min(twice)!r}; give each its own")
        reserved = {"student", "critic"} & {effect.name for effect in self.effects}
        if reserved:
            raise ValueError(f"no effect can be called {min(reserved)!r}, which has a meaning in training; rename it")
        if self.objective.dual_stream and self.data.general_instructions == ():
            raise ValueError(
                "objective.dual_stream needs data.general_instructions; add some, leave the key out for those that ship "
                "with clora, or switch it off"
            )
        return self


def load_config(
    path: str | Path, overrides: Iterable[str] = (), with_prompts: bool = True, preset: str | None = None
) -> DistillConfig:
    """Reads and checks a config file, and the prompts file that it names.

    Args:
        path: a YAML file.
        overrides: ``key.sub=value`` each, the value in YAML; list entries by number (``effects.0.lora=x``). One text is
            one override.
        with_prompts: false leaves the prompts file unread, for the command that writes it.
        preset: ``paper`` or ``clora``, a recipe of settings. The file's own replace it, and overrides replace both.

    Returns:
        The config with every default filled in.

    Raises:
        CloraError: an unknown preset, a missing or malformed file, or every problem in it: unknown keys with suggestions, wrong types,
            values out of range, two effects of one name or trigger. Also a prompts file that cannot be read or is of
            other effects.
    """
    overrides = (overrides,) if isinstance(overrides, str) else tuple(overrides)
    tree = read_tree(path)
    fill_empty_sections(DistillConfig, tree)
    if preset is not None:
        tree = merged(read_preset(preset), tree)
    apply_overrides(tree, overrides)
    reading = Reading(user_path(path).parent)
    section = tree.get("prompts")
    if with_prompts and isinstance(section, dict) and section.get("file") is not None:
        # Only a valid tree can be filled.
        file = validate(DistillConfig, tree, str(path), overrides, reading._replace(is_filled=False)).prompts.file
        assert file is not None, "the tree has it"
        _check_place("prompts.file", file, str(path))
        if not Path(file).exists():
            raise CloraError(f"{path}: prompts.file: {file} does not exist; write it with: clora prompts {path}")
        fill_prompts(tree, read_prompts(file), file)
    # What the prompts file brings is checked as if the config stated it.
    config = validate(DistillConfig, tree, str(path), overrides, reading)
    for setting, file in {"pipeline": config.pipeline, **named_files(config.model_dump())}.items():
        _check_place(setting, file, str(path))
    return config


def _check_place(setting: str, file: str, where: str) -> None:
    """Refuses a path that is relative to the working directory, where it exists, and not to the config's folder."""
    written = as_written(file)
    elsewhere = Path(where).parent.resolve() != Path().resolve() and not user_path(written).is_absolute()
    # A pipeline that is not in the config's folder is left as written: perhaps it is on the Hub.
    if elsewhere and user_path(written).exists() and (file == written or not Path(file).exists()):
        raise CloraError(
            f"{where}: {setting}: paths are relative to the config's own folder, and {written} is only in the working "
            f"directory; write {os.path.relpath(user_path(written), Path(where).parent)}"
        )


def general_instructions(data: DataConfig) -> tuple[str, ...]:
    """Returns the instructions of the general stream: the config's, those of its text file, or those that ship.

    Raises:
        CloraError: the file is missing, unreadable or empty.
    """
    if data.general_instructions is None:
        return everyday_instructions()
    if not isinstance(data.general_instructions, str):
        return data.general_instructions
    path = data.general_instructions
    with about("data.general_instructions"):
        lines = read_text(Path(path), "a text file with one instruction on each line").splitlines()
    instructions = tuple(line.strip() for line in lines if line.strip())
    if not instructions:
        raise CloraError(f"data.general_instructions: {path} is empty; expected one instruction on each line")
    return instructions
