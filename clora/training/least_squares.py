"""The student's start by least squares: a LoRA that changes the inputs of a layer as the teachers change theirs.

Source: docs/method.md section 4(d), after SSR-Merge (arXiv 2606.10617). The inputs are those of passes on noised targets under the
student's prompts, each with its teacher's LoRA, so that they are what a student meets that has learned all effects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clora.bank.bank import AdapterBank
from clora.bank.pages import teacher_pages
from clora.config.settings import DistillConfig
from clora.data.batches import GENERAL, DistillData, Rows, effect_rows, general_rows
from clora.devices import send
from clora.errors import CloraError
from clora.flow.matching import add_noise
from clora.flow.objective import draw_anchor_sigma
from clora.lora.algebra import least_squares
from clora.lora.layers import LayerShapes, linear_shapes
from clora.lora.state import LoRAModule, LoRAState
from clora.models import ModelAdapter
from clora.models.conditioning import Conditioning
from clora.progress import stage
from clora.training.memory import SHARE, free_memory
from clora.training.rows import slices

ROWS = 32
"""Rows of each effect."""
ROWS_AT_ONCE = 16
"""Rows of a pass, where ``train.forward_rows`` does not state them."""
_SEED = 1 << 31
"""Beyond all seeds of a config: the draws are not those of the training that follows."""
_TOKENS_AT_ONCE = 8192
"""Inputs that are converted to fp32 at once."""


def start_rows(config: DistillConfig, has_general: bool) -> tuple[int, int]:
    """Returns the rows of each effect, and of the general stream, which has the share of the rows that it has in training.

    Args:
        config: the settings.
        has_general: the general stream has targets; without them it has no rows.
    """
    if not (config.objective.dual_stream and has_general):
        return ROWS, 0
    # At most as many as all effects have together.
    share = max(config.objective.switch_probability, 0.5)
    return ROWS, round(ROWS * len(config.effects) * (1 - share) / share)


def rows_at_once(config: DistillConfig) -> int:
    """Returns the most rows of a pass."""
    return config.train.forward_rows or ROWS_AT_ONCE


def adapted_layers(layers: Sequence[str], teachers: Sequence[Mapping[str, object]]) -> list[str]:
    """Returns those of the student's layers that a teacher changes; in the others there is nothing to fit.

    Args:
        layers: of the student.
        teachers: each teacher's layers.
    """
    return [layer for layer in layers if any(layer in teacher for teacher in teachers)]


def moment_bytes(shape: tuple[int, int], ranks: Sequence[int]) -> int:
    """Returns the bytes that a layer's `Moments` take while they are gathered.

    Args:
        shape: ``(out, in)`` of the layer.
        ranks: of the teachers that change it.
    """
    return 4 * shape[1] * (shape[1] + 2 * sum(ranks))


def solving_bytes(shape: tuple[int, int], ranks: Sequence[int]) -> int:
    """Returns the most bytes that a layer's fit takes beside its moments: in fp64 a matrix, its factor, and the updates."""
    return 8 * (2 * shape[1] ** 2 + 4 * sum(ranks) * sum(shape))


def layer_groups(sizes: Mapping[str, int], free: int | None) -> list[list[str]]:
    """Splits layers, in order, into groups whose moments fit half of the free memory; at least one layer in each.

    The passes are run again for each group. They are the same ones, so that the result does not depend on the groups.

    Args:
        sizes: bytes of each layer's moments.
        free: bytes; None for unknown, which bounds nothing.
    """
    groups: list[list[str]] = []
    filled = 0
    for layer, size in sizes.items():
        filled += size
        if not groups or (free is not None and filled > SHARE * free):
            groups.append([])
            filled = size
        groups[-1].append(layer)
    return groups


class Moments:
    """Sums over the inputs x of a layer: ``S = sum x x^T`` of all, and ``A_k S_k`` of each teacher's own.

    The teachers' part is kept at their ranks: S_k itself would be as large as S for each of them.

    Args:
        loras: effect, as its number, to the teacher's update of this layer; of those that change it.
        in_features: of the layer.
        device: where its inputs are.
    """

    def __init__(self, loras: Mapping[int, LoRAModule], in_features: int, device: torch.device):
        self.loras = loras
        self.inputs = torch.zeros(in_features, in_features, device=device)
        self._lora_A = {effect: lora.lora_A.to(device) for effect, lora in loras.items()}
        self._changed = {effect: torch.zeros_like(lora_A) for effect, lora_A in self._lora_A.items()}

    def add(self, effect: int, x: Tensor) -> None:
        """Adds inputs ``[B, ..., in]`` of an effect, or of the general stream."""
        for rows in x.flatten(0, -2).split(_TOKENS_AT_ONCE):
            rows = rows.to(self.inputs.device, torch.float32)
            self.inputs.addmm_(rows.T, rows)
            if effect in self.loras:
                self._changed[effect].addmm_(self._lora_A[effect] @ rows.T, rows)

    def fit(self, rank: int) -> LoRAModule | None:
        """Returns the update of that rank, on the CPU; None for a layer that no pass has called."""
        if not self.inputs.any():
            return None
        inputs, changed = self.inputs, torch.cat([*self._changed.values()])
        if inputs.device.type == "mps":  # which has no fp64
            inputs, changed = inputs.cpu(), changed.cpu()
        lora_B = torch.cat([lora.lora_B for lora in self.loras.values()], dim=1).to(inputs.device)
        module = least_squares(lora_B, changed, inputs, rank)
        return LoRAModule(module.lora_A.cpu(), module.lora_B.cpu())


class _Batch(NamedTuple):
    """Rows of one effect, or of the general stream: noise levels ``[B]`` and noise ``[B, T, C]`` for their targets."""

    effect: int
    rows: Rows
    sigma: Tensor
    noise: Tensor


@torch.no_grad()
def least_squares_start(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: Mapping[str, LoRAState],
    data: DistillData,
    layers: Sequence[str],
) -> LoRAState:
    """Fits one LoRA of rank ``config.student.rank`` to all teachers, layer by layer.

    Args:
        config: the settings; every draw follows from its seed.
        adapter: the model family.
        teachers: effect name to LoRA, in the order of ``data.effects``.
        data: encoded training data.
        layers: of the student.

    Returns:
        An update of each layer that a teacher changes, on the CPU; of less than that rank where the teachers together have less.

    Raises:
        CloraError: a pass is not finite; names the effect.
    """
    transformer = adapter.pipeline.transformer
    shapes = linear_shapes(transformer)
    loras = {}
    for layer in adapted_layers(layers, [state.modules for state in teachers.values()]):
        states = enumerate(teachers.values())
        loras[layer] = {effect: state.modules[layer] for effect, state in states if layer in state.modules}
    each, general = start_rows(config, data.general_targets is not None)
    pages = teacher_pages(config.train.teacher_memory_gb, transformer, list(teachers.values()))
    modules: dict[str, LoRAModule] = {}
    with AdapterBank(transformer, teachers, pages=pages) as bank:
        groups = layer_groups(_sizes(loras, shapes), free_memory(transformer.device))
        with stage("least-squares start", len(groups) * (each * len(teachers) + general)) as advance:
            for group in groups:
                moments = {layer: Moments(loras[layer], shapes[layer][1], transformer.device) for layer in group}
                for batch in _batches(config, data, each, general):
                    with bank.observed(partial(_add, moments, batch.effect)):
                        _run(adapter, bank, data, batch)
                    advance(len(batch.sigma))
                for layer in group:
                    # Its moments make room for the next layer's fit.
                    if (module := moments.pop(layer).fit(config.student.rank)) is not None:
                        modules[layer] = module
    return LoRAState(modules, format="least_squares")


def _sizes(loras: Mapping[str, Mapping[int, LoRAModule]], shapes: LayerShapes) -> dict[str, int]:
    return {layer: moment_bytes(shapes[layer], [lora.rank for lora in own.values()]) for layer, own in loras.items()}


def _add(moments: Mapping[str, Moments], effect: int, layer: str, x: Tensor) -> None:
    if layer in moments:
        moments[layer].add(effect, x)


def _batches(config: DistillConfig, data: DistillData, each: int, general: int) -> Iterator[_Batch]:
    """Draws all rows, teacher by teacher: the same ones at every call, however many are in a batch."""
    generator = torch.Generator().manual_seed(config.seed + _SEED)
    for effect in (*range(len(data.effects)), GENERAL):
        count = general if effect == GENERAL else each
        if count == 0:
            continue
        samples = len(data.general_pairs) if effect == GENERAL else data.targets.shape[1]
        # Every target in turn.
        sample = torch.randperm(samples, generator=generator).repeat(-(-count // samples))[:count]
        phrasing = torch.randint(data.student_text.shape[1], (count,), generator=generator)
        sigma = draw_anchor_sigma(count, config.sampler.shift, generator)
        for c in slices(count, rows_at_once(config)):
            if effect == GENERAL:
                rows = general_rows(data, sample[c])
            else:
                effects = torch.full_like(sample[c], effect)
                rows = effect_rows(data, config.objective, effects, sample[c], phrasing[c])
            # Row by row, since one draw for several rows has other values.
            noise = [torch.randn(target.shape, generator=generator) for target in rows.target]
            yield _Batch(effect, rows, sigma[c], torch.stack(noise))


def _run(adapter: ModelAdapter, bank: AdapterBank, data: DistillData, batch: _Batch) -> None:
    """Runs the pass of a batch under the student's prompts, with the teacher's LoRA or only the base."""
    device = bank.transformer.device
    effect, rows, sigma, noise = batch
    conditioning = Conditioning(data.text[rows.student].to(device), send(rows.source, device))
    target = send(rows.target, device, torch.float32)
    x = add_noise(target, send(noise, device), sigma).to(adapter.latent_dtype)
    with bank.placed(rows.effect) as slots, bank.route(slots, rows.effect):
        bank.fetch(torch.tensor([(effect + 1) % len(data.effects)]))  # the next teacher arrives meanwhile
        velocity = adapter.velocity(x, send(sigma, device), conditioning)
    if not velocity.isfinite().all():
        name = "the base, in the general stream," if effect == GENERAL else f"effect {data.effects[effect]!r}"
        raise CloraError(
            f"student.init: least_squares: {name} gives values that are not finite on its noised targets; look at the "
            "targets and the LoRA, or start from student.init: merge"
        )
