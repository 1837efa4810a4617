"""The calls of the multi-adapter linear layer that its Triton kernels cover."""

import torch
from torch import Tensor

from csrc_triton.multi_lora.reference import check_add_shapes, check_shapes
from csrc_triton.registration import INTERPRETED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """The reason why the kernels cannot compute a call of `multi_lora_linear_triton`, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is not as the reference takes it.
    """
    check_shapes(x, weight, bias, lora_A, lora_B, scale, adapter_ids)
    return _gap(x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B, scale=scale, ids=adapter_ids)


def unsupported_add(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: Tensor, adapter_ids: Tensor
) -> str | None:
    """The reason why the kernels cannot compute a call of `multi_lora_add_triton`, or None.

    Raises:
        ValueError: a shape or the dtype of the ids is not as the reference takes it.
    """
    check_add_shapes(y, x, lora_A, lora_B, scale, adapter_ids)
    return _gap(x, y=y, lora_A=lora_A, lora_B=lora_B, scale=scale, ids=adapter_ids)


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
