"""The engine: teachers and encoded data in, one student LoRA out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from clora.bank.bank import AdapterBank
from clora.bank.pages import teacher_pages
from clora.config.settings import DistillConfig
from clora.data.batches import DistillData
from clora.errors import CloraError
from clora.lora.algebra import sum_svd
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.state import LoRAModule, LoRAState, fresh_lora
from clora.models import ModelAdapter
from clora.stopping import StopRequest
from clora.training.least_squares import least_squares_start
from clora.training.previews import Previews
from clora.training.resume import Checkpoints
from clora.training.steps import CRITIC
from clora.training.trainer import DistillTrainer, Report


def train_student(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: dict[str, LoRAState],
    data: DistillData,
    report: Report,
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
    start: LoRAState | None = None,
    previews: Previews | None = None,
) -> LoRAState:
    """Distils the teachers into one LoRA of rank ``config.student.rank``; the transformer is left as it was.

    Args:
        config: the settings.
        adapter: the model family.
        teachers: effect name to LoRA, in the order of ``data.effects``. Emptied once the bank has its copies, which are often
            of fewer bits: of many teachers it is gigabytes.
        data: encoded training data.
        report: called after every student update.
        checkpoints: where to resume from and to write to.
        stop: looked at after every update.
        start: from `first_student`, which shows a progress of its own: a caller with a bar for the training makes it before.
            None to make it here.
        previews: drawn while it trains.

    Raises:
        CloraError: training diverged; names update, effect and term.
        KeyboardInterrupt, Stopped: as `StopRequest.stop`, with a checkpoint.
    """
    transformer = adapter.pipeline.transformer
    student = first_student(config, adapter, teachers, data, checkpoints) if start is None else start
    with AdapterBank(
        transformer,
        {CRITIC: student, **teachers},
        pages=teacher_pages(config.train.teacher_memory_gb, transformer, list(teachers.values())),
        fixed=1,
    ) as bank:
        trainer = DistillTrainer(config, adapter, bank, data, student, student)
        del student  # bank and trainer have copies
        teachers.clear()
        trainer.fit(report, checkpoints, stop, previews)
    return trainer.exported()


def first_student(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    data: DistillData,
    checkpoints: Checkpoints | None = None,
) -> LoRAState:
    """The student before training, by ``student.init``.

    Args:
        config, adapter, teachers, data, checkpoints: as in `train_student`. A run that goes on from a checkpoint, which holds
            the student, gets zero deltas: nothing is fitted.

    Raises:
        CloraError: a pass of a least-squares start is not finite, or there is a checkpoint of another run.
    """
    transformer = adapter.pipeline.transformer
    if config.student.init != "least_squares":
        return initial_student(config, transformer, list(teachers.values()))
    fresh = _fresh(config, transformer)
    if checkpoints is not None and checkpoints.start(config) is not None:
        return fresh
    fitted = least_squares_start(config, adapter, teachers, data, list(fresh.modules))
    return LoRAState({name: _fill(module, fitted.modules.get(name)) for name, module in fresh.modules.items()})


def initial_student(config: DistillConfig, transformer, teachers: list[LoRAState]) -> LoRAState:
    """The start that needs no data: a zero delta, or the mean of the teachers' deltas cut to the student's rank.

    Ranks that the mean leaves empty get a random ``lora_A``, else they would never learn.
    """
    assert config.student.init != "least_squares", "see first_student"
    fresh = _fresh(config, transformer)
    if config.student.init == "zero":
        return fresh
    merged = sum_svd(teachers, config.student.rank, [1 / len(teachers)] * len(teachers))
    return LoRAState({name: _fill(module, merged.modules.get(name)) for name, module in fresh.modules.items()})


def _fresh(config: DistillConfig, transformer) -> LoRAState:
    generator = torch.Generator().manual_seed(config.seed)
    layers = student_layers(transformer, config.student.targets)
    return fresh_lora(linear_shapes(transformer), config.student.rank, generator, layers)


def _fill(fresh: LoRAModule, merged: LoRAModule | None) -> LoRAModule:
    """The merged ranks, then fresh ones for those that they leave empty."""
    if merged is None:
        return fresh
    # A row's norm is the square root of its singular value; of teachers padded with zeros some are 0. A rank whose
    # lora_A and lora_B are both 0 would get no gradient.
    norms = merged.lora_A.norm(dim=1)
    alive = int((norms > 1e-5 * norms.max()).sum())
    a = torch.cat([merged.lora_A[:alive], fresh.lora_A[alive:]])
    b = torch.cat([merged.lora_B[:, :alive], fresh.lora_B[:, alive:]], dim=1)
    return LoRAModule(a, b)


def student_layers(transformer, suffixes: tuple[str, ...] | None) -> list[str]:
    """The linear layers of the blocks whose names end in one of ``suffixes``; all of them for None.

    Raises:
        CloraError: a suffix fits no layer.
    """
    names = block_layers(transformer)
    if suffixes is None:
        return names
    unused = [suffix for suffix in suffixes if not any(name.endswith(suffix) for name in names)]
    if unused:
        raise CloraError(
            f"student.targets: no linear layer of the blocks ends in {unused}; they are called {names[:6]}..."
        )
    return [name for name in names if name.endswith(tuple(suffixes))]
