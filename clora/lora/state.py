"""One LoRA in memory, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from clora.lora.layers import LayerShapes


@dataclass(frozen=True)
class LoRAModule:
    """The low-rank update of one linear layer; alpha is already folded into ``lora_B``.

    Attributes:
        lora_A: ``[rank, in]`` fp32.
        lora_B: ``[out, rank]`` fp32.
    """

    lora_A: Tensor
    lora_B: Tensor

    @property
    def rank(self) -> int:
        """Number of rows of ``lora_A``."""
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """Returns the change of the layer's weight, ``[out, in]``."""
        return self.lora_B @ self.lora_A

    def padded(self, rank: int) -> LoRAModule:
        """Returns the same update with zero rows and columns up to ``rank``.

        Raises:
            ValueError: ``rank`` is below the module's own rank.
        """
        extra = rank - self.rank
        if extra < 0:
            raise ValueError(f"cannot pad a rank-{self.rank} LoRA module to rank {rank}")
        return LoRAModule(functional.pad(self.lora_A, (0, 0, 0, extra)), functional.pad(self.lora_B, (0, extra)))


@dataclass(frozen=True)
class LoRAState:
    """A whole LoRA: the update of each module of the transformer that it changes.

    Attributes:
        modules: module path in the diffusers transformer (``transformer_blocks.0.attn.to_q``) to its update.
        metadata: the file's own string metadata.
        format: the file format it was read from (see `clora.lora.keys`), or how it was made.
        errors: the modules whose file held a change that is not of low rank, to the error of the factors that stand for
            it, ``|change - B A| / |change|`` (Frobenius). All others are exact.
    """

    modules: Mapping[str, LoRAModule]
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: str = "memory"
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The largest rank of any module; 0 where there is none."""
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def num_parameters(self) -> int:
        """Number of stored values of all ``lora_A`` and ``lora_B``."""
        return sum(module.lora_A.numel() + module.lora_B.numel() for module in self.modules.values())

    def padded(self, rank: int) -> LoRAState:
        """Returns the same LoRA with every module zero-padded to ``rank``."""
        return replace(self, modules={name: module.padded(rank) for name, module in self.modules.items()})


def fresh_lora(
    shapes: LayerShapes, rank: int, generator: torch.Generator, modules: Sequence[str] | None = None
) -> LoRAState:
    """Makes an untrained LoRA: random ``lora_A``, zero ``lora_B``, so that its delta is zero.

    Args:
        shapes: of the transformer's layers.
        rank: rank of every module.
        generator: source of ``lora_A``.
        modules: the modules to adapt; all of ``shapes`` by default.
    """
    made = {}
    for name in shapes if modules is None else modules:
        out_features, in_features = shapes[name]
        # Uniform within 1 / sqrt(in), as nn.Linear begins (Kaiming with a = sqrt(5)) and PEFT's lora_A with it.
        bound = in_features**-0.5
        lora_A = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
        made[name] = LoRAModule(lora_A, torch.zeros(out_features, rank))
    return LoRAState(made)
