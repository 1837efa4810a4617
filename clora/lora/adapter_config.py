"""Rank and alpha as PEFT and diffusers state them beside the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clora.errors import CloraError

_KINDS = ("LORA", "LOHA", "LOKR")

# With these starts PEFT also replaces the base's weights, so that the file alone does not tell the update.
_REPLACES_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")

# Options of PEFT's LoRA whose update is another than alpha / r * B A.
_OTHER_UPDATES = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha as stated beside the weights; everything may be absent."""

    rank: int | None = None
    alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> AdapterConfig:
        """Reads the fields of ``adapter_config.json`` or of diffusers' ``lora_adapter_metadata``.

        Args:
            values: the JSON object; diffusers' ``transformer.`` prefix is removed.
            where: file name for the error message.

        Raises:
            CloraError: another adapter type than LoRA, LoHa or LoKr, an option whose update the tensors alone do not
                tell, or a value of the wrong type.
        """
        values = {key.removeprefix("transformer."): value for key, value in values.items()}
        _refuse_other_adapters(values, where)
        alpha = values.get("lora_alpha", values.get("alpha"))  # LoHa and LoKr call it alpha
        try:
            return cls(
                rank=None if values.get("r") is None else int(values["r"]),
                alpha=None if alpha is None else _finite(alpha),
                rank_pattern={key: int(value) for key, value in (values.get("rank_pattern") or {}).items()},
                alpha_pattern={key: _finite(value) for key, value in (values.get("alpha_pattern") or {}).items()},
                use_rslora=bool(values.get("use_rslora")),
                use_dora=bool(values.get("use_dora")),
            )
        except (TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CloraError(f"{where}: r, alpha and their patterns must be numbers ({error})") from error

    def module_rank(self, module: str) -> int | None:
        """The stated rank of a module, None where the config is silent."""
        return _match_pattern(self.rank_pattern, module, self.rank)

    def module_alpha(self, module: str) -> float | None:
        """The stated alpha of a module, None where the config is silent."""
        return _match_pattern(self.alpha_pattern, module, self.alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """The factor on the update: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _refuse_other_adapters(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type") or "LORA"
    if kind not in _KINDS:
        raise CloraError(f"{where} describes {kind}, which is not supported; expected one of {', '.join(_KINDS)}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REPLACES_BASE):
        raise CloraError(
            f"{where}: with init_lora_weights = {start!r} the update is relative to a base that PEFT changed, so the "
            "file alone does not tell it; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    other = [name for name in _OTHER_UPDATES if values.get(name)]
    if other:
        raise CloraError(f"{where}: {', '.join(other)} makes another update than alpha / r * B A; not supported")


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"found {number}")
    return number


def _match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first key that is, as a regular expression, the module's name or a dotted tail of it."""
    for key, value in pattern.items():
        try:
            if key == module or re.fullmatch(rf"(.*\.)?({key})", module):
                return value
        except re.error as error:
            raise CloraError(f"adapter config: {key!r} is no valid module pattern ({error})") from error
    return default
