"""The numerical operations of clora, on Triton kernels or eager PyTorch.

First the choice of the backend, then the ops. `auto` (the default) takes Triton for tensors on an NVIDIA GPU. Elsewhere, on
AMD GPUs too, it takes eager PyTorch and logs the reason once. `triton` and `eager` insist; `triton` runs on AMD GPUs.
The environment variable `CLORA_BACKEND` chooses, or for one call the op's argument `backend`. Which of its designs computes the
linear layer follows from shapes and precision (`csrc_triton.multi_lora.designs`), unless `CLORA_DESIGN` or `design` names one.

Only this module imports `csrc_triton`, whose kernels it loads when they are first used.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clora.errors import CloraError, nearest
from csrc_triton.coarse_to_fine import reference as coarse_to_fine
from csrc_triton.coarse_to_fine.reference import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION, Scores
from csrc_triton.multi_lora import reference as multi_lora
from csrc_triton.multi_lora.by_runs import Projection, Run, is_plain, linears_by_runs, runs_of
from csrc_triton.multi_lora.designs import DESIGNS, merged_in_all

__all__ = [
    "ANCHOR",
    "BACKWARD_SIMULATION",
    "TARGET_SIMULATION",
    "Run",
    "Scores",
    "check_choices",
    "chosen",
    "coarse_to_fine_loss",
    "multi_lora_add",
    "multi_lora_linear",
    "multi_lora_linears",
    "runs_of",
]


VARIABLE = "CLORA_BACKEND"
DESIGN = "CLORA_DESIGN"
BACKENDS = ("auto", "triton", "eager")
NO_KERNELS = (
    f"design fused ({DESIGN} or `design`) is one of the Triton kernels, which do not run here; use split or auto"
)
MIN_CAPABILITY = (8, 0)
"""Oldest NVIDIA GPU that Triton supports (Ampere)."""

logger = logging.getLogger(__name__)


class Obstacle(NamedTuple):
    """The reason why the kernels cannot run, and the user's remedy, if one exists."""

    reason: str
    remedy: str = ""


def use_triton(op: str, device: torch.device, backend: str | None = None) -> bool:
    """Chooses the Triton kernels for a call, as far as the machine decides; `covered` decides by the arguments.

    Args:
        op: name of the op, for messages.
        device: where its tensors are.
        backend: `auto`, `triton` or `eager`; None takes `CLORA_BACKEND`, and `auto` where that is unset or empty.

    Raises:
        CloraError: the backend's name is unknown, or it is `triton` and the kernels cannot run there.
    """
    choice = _choice(backend)
    if choice == "eager":
        return False
    obstacle = _obstacle(device, explicit=choice == "triton")
    if obstacle is not None:
        _fall_back(op, obstacle, device.type, backend)
    return obstacle is None


def covered(op: str, gap: str | None, device: torch.device, backend: str | None = None) -> bool:
    """Chooses the Triton kernels for a call that `use_triton` allowed, unless its arguments are beyond them.

    Args:
        gap: the part of this call that they do not compute, or None.

    Raises:
        CloraError: there is a gap and the backend is `triton`.
    """
    if gap is not None:
        _fall_back(op, Obstacle(f"the kernels of {op} do not cover this call ({gap})"), device.type, backend)
    return gap is None


# So that torch.compile evaluates the choice while it traces and keeps the answer. This is all that
# torch.compiler.assume_constant_result does, but calling it here would import torch._dynamo, which takes seconds.
use_triton._dynamo_marked_constant = covered._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _choice(backend: str | None) -> str:
    choice = os.environ.get(VARIABLE) or "auto" if backend is None else backend
    if choice not in BACKENDS:
        known = ", ".join(BACKENDS)
        raise CloraError(f"{_source(backend)}: expected one of {known}{nearest(str(choice).lower(), BACKENDS)}")
    return choice


def _source(backend: str | None) -> str:
    """Returns the variable or argument that chose the backend, for messages; an argument may come from `chosen`."""
    variable = os.environ.get(VARIABLE, "")
    return f"{VARIABLE}={variable}" if backend in (None, variable) else f"backend={backend!r}"


def _fall_back(op: str, obstacle: Obstacle, device_type: str, backend: str | None) -> None:
    """Raises if the user chose Triton; otherwise logs why eager PyTorch runs."""
    if _choice(backend) == "triton":
        source = _source(backend)
        remedy = f"unset {VARIABLE}" if source.startswith(VARIABLE) else "use backend 'auto'"
        if obstacle.remedy:
            remedy = f"{obstacle.remedy}, or {remedy}"
        raise CloraError(f"{source}, but {op} cannot run on Triton: {obstacle.reason}; {remedy}")
    _report(obstacle.reason, device_type)


@functools.lru_cache
def _obstacle(device: torch.device, explicit: bool) -> Obstacle | None:
    """Finds the obstacle to every kernel on a device. `auto` imports Triton only on NVIDIA GPUs."""
    off_gpu = device.type != "cuda"  # AMD GPUs are "cuda" too
    no_gpu = Obstacle(
        f"the tensors are on {device.type}, and the kernels need a GPU",
        "move them to one, or for tests start Python with TRITON_INTERPRET=1 to interpret the kernels, slowly",
    )
    # `auto` decides without Triton where it can: importing it takes seconds.
    if off_gpu and not explicit:
        return no_gpu
    if torch.version.hip and not explicit:
        return Obstacle(f"{device} is an AMD GPU, on which they have never run ({VARIABLE}=triton runs them there)")
    if error := _import_error():
        return Obstacle(f"Triton cannot be imported ({error})", "install it with `pip install triton` (Linux)")
    if interpreting():
        return None if explicit else Obstacle("TRITON_INTERPRET is set, a mode for tests", "unset it")
    if off_gpu:
        return no_gpu
    if not torch.version.hip and (capability := torch.cuda.get_device_capability(device)) < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return Obstacle(f"{device} has compute capability {found}, and Triton needs {needed}")
    return None


@functools.cache
def _import_error() -> str:
    """Returns the error of importing Triton; empty if it can be imported."""
    try:
        import triton.language  # noqa: F401
    except Exception as error:  # a broken installation raises more than ImportError
        return f"{type(error).__name__}: {error}"
    return ""


def interpreting() -> bool:
    """Detects that Triton, which must be importable, was imported to interpret kernels."""
    from csrc_triton.registration import INTERPRETED

    return INTERPRETED


@functools.cache
def _report(reason: str, device_type: str) -> None:
    """Logs a fallback, once per reason: expected on a CPU, worth a warning on a GPU."""
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    logger.log(level, "running on eager PyTorch instead of the Triton kernels: %s", reason)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    adapter_ids: Tensor,
    *,
    runs: tuple[Run, ...] | None = None,
    strengths: tuple[float, ...] | None = None,
    backend: str | None = None,
    design: str | None = None,
) -> Tensor:
    """Linear layer whose samples each add the low-rank delta of their own adapter.

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_linear`. The calls that the Triton
    kernels do not cover: `csrc_triton.multi_lora.checks.unsupported`.

    Args:
        runs: ``adapter_ids`` as the host knows them (`runs_of`). Without them nothing is merged on a GPU; on a CPU they are read.
        strengths: size of each adapter against the weight's, ``|scale B A| / |W|``; None for unknown or trained adapters,
            which are not merged in 16 bits.
        backend: `auto`, `triton` or `eager` for this call; None takes `CLORA_BACKEND`.
        design: `merged`, `fused` or `split` for this call, or `auto`, the fastest of them that is exact enough; None takes
            `CLORA_DESIGN`, and `auto` where that is unset or empty.

    Raises:
        ValueError: a shape or dtype is wrong, or the runs are those of another number of samples.
        CloraError: the backend or the design is unknown, or was asked for and cannot run this call.
    """
    layers = ((weight, bias, lora_A, lora_B),)
    strengths = None if strengths is None else (strengths,)
    return multi_lora_linears(
        x, layers, scale, adapter_ids, runs=runs, strengths=strengths, backend=backend, design=design
    )[0]


def multi_lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    scale: Tensor,
    adapter_ids: Tensor,
    *,
    runs: tuple[Run, ...] | None = None,
    strengths: Sequence[tuple[float, ...] | None] | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str | None = None,
    design: str | None = None,
) -> list[Tensor]:
    """Several layers of one input (q, k and v; gate and up); the Triton kernels read it once for their ranks.

    ::

        [multi_lora_linear(x, weight, bias, lora_A, lora_B, scale, adapter_ids)
         for weight, bias, lora_A, lora_B in projections]

    Exactly this, layer by layer, on eager PyTorch and where the kernels do not cover one of the layers.

    Args:
        projections: ``(weight, bias, lora_A, lora_B)`` of each layer; ranks and outputs may differ.
        strengths: of each layer, as in `multi_lora_linear`.
        out: tensors to which the outputs are written, contiguous; only without gradients.
        runs, backend, design: as in `multi_lora_linear`.

    Returns:
        ``[B, T, N]`` per layer.

    Raises:
        ValueError, CloraError: as `multi_lora_linear`.
    """
    design = _design(design)
    if runs is not None and (covers := runs[-1].stop if runs else 0) != x.shape[0]:
        raise ValueError(f"runs: expected those of the {len(x)} samples of x, found those of {covers}")
    strengths = strengths or [None] * len(projections)
    if not use_triton("multi_lora_linear", x.device, backend):
        return _eager_linears(x, projections, scale, adapter_ids, runs, strengths, out, design)
    from csrc_triton.multi_lora import op

    outputs = op.recorded(x, projections, scale, adapter_ids, design, runs=runs, strengths=strengths)
    if outputs is not None:
        return _written(list(outputs), out)
    gaps = [op.unsupported(x, *projection, scale, adapter_ids) for projection in projections]
    if len(gaps) == 1 and not covered("multi_lora_linear", gaps[0], x.device, backend):
        return _eager_linears(x, projections, scale, adapter_ids, runs, strengths, out, design)
    if any(gaps):  # layer by layer, those that the kernels cover on them
        options = {"runs": runs, "backend": backend, "design": design or "auto"}
        outputs = []
        for i, projection in enumerate(projections):
            own = {"strengths": strengths[i : i + 1], "out": out and out[i : i + 1]}
            outputs += multi_lora_linears(x, [projection], scale, adapter_ids, **own, **options)
        return outputs
    return _kernel_linears(x, projections, scale, adapter_ids, runs, strengths, out, design)


def _kernel_linears(x, projections, scale, adapter_ids, runs, strengths, out, design: str | None) -> list[Tensor]:
    """Layers that the kernels cover, on them and merged."""
    from csrc_triton.multi_lora import op

    if design == "merged" and runs is None:
        raise CloraError("the design merged needs `runs`: the host must know which rows share an adapter; use split")
    merged = merged_in_all(x, projections, runs, strengths, design)
    exact = None if design == "merged" else design  # of the rows that are not merged
    if merged and all(run.adapter in merged or run.adapter < 0 for run in runs):
        return linears_by_runs(x, projections, scale, runs, [merged] * len(projections), out)
    # With gradients, rows of both kinds would need a graph of parts.
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *(f for p in projections for f in p[2:])))
    if not merged or learns:
        return _written(op.multi_lora_linears(x, projections, scale, adapter_ids, exact, checked=True), out)
    return op.partly_merged_linears(x, projections, scale, adapter_ids, runs, merged, out)


def _written(results: list[Tensor], out: Sequence[Tensor] | None) -> list[Tensor]:
    """Writes results to the tensors that the caller gave, if any."""
    if out is None:
        return results
    for y, result in zip(out, results, strict=True):
        y.copy_(result)
    return list(out)


def _eager_linears(x, projections, scale, adapter_ids, runs, strengths, out, design: str | None) -> list[Tensor]:
    """Layers on PyTorch: by runs where they can be known, else as they are defined."""
    for projection in projections:
        multi_lora.check_shapes(x, *projection, scale, adapter_ids)
    if design == "fused":
        raise CloraError(NO_KERNELS)
    # torch.compile would make a graph for every batch.
    if not torch.compiler.is_compiling() and all(is_plain(x, *layer[:2], scale) for layer in projections):
        if runs is None and type(adapter_ids) is Tensor and adapter_ids.device.type == "cpu":
            runs = runs_of(adapter_ids.tolist())
        if runs is not None:
            pairs = zip(projections, strengths, strict=True)
            merged = [merged_in_all(x, [layer], runs, [strength], design) for layer, strength in pairs]
            return linears_by_runs(x, projections, scale, runs, merged, out)
    if design == "merged":
        raise CloraError(
            "the design merged needs `runs` and a frozen base of x's dtype, without autocast and torch.compile; use split"
        )
    return _written([multi_lora.multi_lora_linear(x, *layer, scale, adapter_ids) for layer in projections], out)


def _design(design: str | None) -> str | None:
    """Returns the design that the argument or `CLORA_DESIGN` names; None for `auto`, the fastest that is exact enough."""
    choice = os.environ.get(DESIGN) or "auto" if design is None else design
    if choice == "auto":
        return None
    if choice not in DESIGNS:
        source = f"{DESIGN}={choice}" if design is None else f"design={choice!r}"
        known = ("auto", *DESIGNS)
        raise CloraError(f"{source}: expected one of {', '.join(known)}{nearest(str(choice).lower(), known)}")
    return choice


def chosen() -> dict[str, str]:
    """Returns the `backend` and `design` that the environment chooses; raises CloraError where one has no meaning."""
    return {"backend": _choice(None), "design": _design(None) or "auto"}


def check_choices(device: torch.device) -> None:
    """Raises CloraError where `CLORA_BACKEND` or `CLORA_DESIGN` has no meaning, or cannot be obeyed on a device."""
    design, on_triton = _design(None), use_triton("multi_lora_linear", device)
    if design == "fused" and not on_triton:
        raise CloraError(NO_KERNELS)


def multi_lora_add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    adapter_ids: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds each sample's low-rank delta to the output of a base layer that was computed elsewhere.

    Meaning, arguments and result: `csrc_triton.multi_lora.reference.multi_lora_add`. The calls that the Triton kernels
    do not cover: `csrc_triton.multi_lora.checks.unsupported_add`. ``backend`` and errors are those of `multi_lora_linear`.
    """
    arguments = (y, x, lora_A, lora_B, scale, adapter_ids)
    if use_triton("multi_lora_add", x.device, backend):
        from csrc_triton.multi_lora import op

        outputs = op.recorded(x, [(None, None, lora_A, lora_B)], scale, adapter_ids, y=y)
        if outputs is not None:
            return outputs[0]
        if covered("multi_lora_add", op.unsupported_add(*arguments), x.device, backend):
            return op.multi_lora_add_triton(*arguments)
    return multi_lora.multi_lora_add(*arguments)


def coarse_to_fine_loss(
    velocity: Tensor,
    x: Tensor,
    sigma: Tensor,
    kind: Tensor,
    weight: Tensor,
    scores: Scores | None,
    anchor_target: Tensor | None,
    guidance: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of the student: distribution matching and trajectory anchoring, with its terms.

    Meaning, arguments and result: `csrc_triton.coarse_to_fine.reference.coarse_to_fine_loss`. The Triton kernels cover
    all of it but fp64 (`csrc_triton.coarse_to_fine.op.unsupported`). ``backend`` is that of `multi_lora_linear`.

    Raises:
        ValueError: a shape is wrong.
        CloraError: the backend is `triton` and cannot run this call, or it is unknown.
    """
    arguments = (velocity, x, sigma, kind, weight, scores, anchor_target, guidance)
    if use_triton("coarse_to_fine_loss", velocity.device, backend):
        from csrc_triton.coarse_to_fine.op import coarse_to_fine_loss_triton, unsupported

        if covered("coarse_to_fine_loss", unsupported(*arguments), velocity.device, backend):
            return coarse_to_fine_loss_triton(*arguments)
    return coarse_to_fine.coarse_to_fine_loss(*arguments)
