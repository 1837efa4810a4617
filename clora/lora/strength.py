"""How strongly a file's modules are applied: the many places where alpha may be, and where it means nothing."""

from __future__ import annotations

from dataclasses import dataclass

from clora.errors import CloraError
from clora.lora.adapters import Adapter
from clora.lora.keys import split_prefix
from clora.lora.source import LoRASource


@dataclass(frozen=True)
class Strength:
    """How strongly a module of a file is applied.

    Attributes:
        alpha: the stated or implied alpha; None where the adapter type has none.
        origin: where alpha is from: ``tensor``, ``config``, ``rank`` (alpha = rank) or ``none``.
        scale: the factor on the product of its matrices.
    """

    alpha: float | None
    origin: str
    scale: float


def find_strength(source: LoRASource, adapter: Adapter) -> Strength:
    """Reads the alpha of one module of a file.

    Raises:
        CloraError: the config states another rank than the tensors have, PEFT weights come without a config, or alpha
            is not finite.
    """
    module = split_prefix(adapter.stem)[1]
    stated_rank, stated_alpha = source.config.module_rank(module), source.config.module_alpha(module)
    # LyCORIS never scales a LoKr of two whole matrices, whatever its alpha says; PEFT does, by its config's rank.
    rank = adapter.rank or stated_rank
    if adapter.kind == "diff":
        return Strength(None, "none", 1.0)
    if stated_rank not in (None, rank):
        message = f"{source.file}: {adapter.stem} has rank {rank} but its config says {stated_rank}"
        raise CloraError(f"{message}, so its strength is not known; export it again")
    if "alpha" in adapter.parts and adapter.rank is not None:
        alpha = source.read_finite({"alpha": adapter.parts["alpha"]})["alpha"].item()
        return Strength(alpha, "tensor", source.config.scale(alpha, adapter.rank))
    if stated_alpha is not None and rank is not None:
        return Strength(stated_alpha, "config", source.config.scale(stated_alpha, rank))
    if adapter.stem.startswith("base_model.model."):
        raise CloraError(
            f"{source.file}: PEFT keeps alpha in an adapter_config.json beside the weights, none is stated there, so "
            "their strength is not known; put that file there"
        )
    if rank is None:
        return Strength(None, "none", 1.0)
    return Strength(float(rank), "rank", source.config.scale(rank, rank))
