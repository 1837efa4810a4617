"""Which layers of a transformer a LoRA is trained on by default."""

from __future__ import annotations

import torch


def linear_names(transformer) -> list[str]:
    """Names of all linear layers inside the transformer's blocks, the default LoRA targets.

    Blocks are what diffusers calls the transformer's repeated blocks, whatever attributes hold them.
    """
    blocks = tuple(
        f"{name}."
        for name, module in transformer.named_modules()
        if type(module).__name__ in transformer._repeated_blocks
    )
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks)
    ]
