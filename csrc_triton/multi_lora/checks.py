"""The calls of the multi-adapter linear layer that its Triton kernels cover."""

from collections.abc import Callable

import torch
from torch import Tensor

from csrc_triton.multi_lora.reference import check_add_shapes, check_shapes
from csrc_triton.registration import INTERPRETED, is_traced
from csrc_triton.replay import Kept

_covered: Kept = Kept()
"""The kinds of calls of which `unsupported` has found that the kernels cover them."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """The reason why the kernels cannot compute a call of `multi_lora_linear_triton`, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is not as the reference takes it.
    """
    return _checked(_gap_of_linear, (x, weight, bias, lora_A, lora_B, scale, adapter_ids))


def unsupported_add(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """The reason why the kernels cannot compute a call of `multi_lora_add_triton`, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is not as the reference takes it.
    """
    return _checked(_gap_of_add, (y, x, lora_A, lora_B, scale, adapter_ids))


def _checked(gap_of: Callable, tensors: tuple[Tensor | None, ...]) -> str | None:
    """``gap_of(*tensors)``, asked once of calls that are covered and alike in everything that it looks at."""
    if is_traced(tensors[0]):
        return gap_of(*tensors)
    traits = [t if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in tensors]
    autocast = torch.is_autocast_enabled("cuda" if tensors[0].is_cuda else "cpu")
    key = (gap_of, autocast, torch.is_grad_enabled(), *traits)
    if key in _covered:
        return None
    gap = gap_of(*tensors)
    if gap is None:
        _covered.keep(key, True)
    return gap


def _gap_of_linear(x, weight, bias, lora_A, lora_B, scale, ids) -> str | None:
    check_shapes(x, weight, bias, lora_A, lora_B, scale, ids)
    return _gap(x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, scale=scale, ids=ids)


def _gap_of_add(y, x, lora_A, lora_B, scale, ids) -> str | None:
    check_add_shapes(y, x, lora_A, lora_B, scale, ids)
    return _gap(x, y=y, lora_A=lora_A, lora_B=lora_B, scale=scale, ids=ids)


def _gap(x: Tensor, **arguments: Tensor | None) -> str | None:
    """The reason why the kernels cannot compute with these arguments, whose shapes are right, or None."""
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"x is on {x.device}, and Triton's interpreter is off"
    if INTERPRETED and x.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    for name, tensor in {"x": x, "lora_A": given["lora_A"], "lora_B": given["lora_B"]}.items():
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, expected one of {[str(dtype) for dtype in DTYPES]}"
    for name in ("weight", "bias", "y"):
        if name in given and given[name].dtype != x.dtype:
            return f"{name} is {given[name].dtype}, x {x.dtype}"
    if (rank := given["lora_A"].shape[1]) > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    trained = [name for name in ("weight", "bias", "scale") if name in given and given[name].requires_grad]
    if trained and torch.is_grad_enabled():
        return f"{' and '.join(trained)} require gradients: expected frozen ones"
    return None
