"""Which layers of a transformer a LoRA is trained on by default."""

from __future__ import annotations

import torch


def linear_names(transformer) -> list[str]:
    """Names of all linear layers inside the transformer's blocks, the default LoRA targets."""
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "transformer_blocks" in name
    ]
