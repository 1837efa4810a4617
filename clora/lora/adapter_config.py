"""Rank and alpha as PEFT and diffusers state them beside the weights.

PEFT writes ``adapter_config.json`` next to its weights, diffusers the same fields into the header of its file. They
scale an update by alpha / rank, and they can describe updates that the tensors by themselves do not determine.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clora.errors import CloraError
from clora.files import read_text
from clora.lora.keys import format_of

METADATA_KEY = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

_KINDS = ("LORA", "LOHA", "LOKR")
# With these starts PEFT also replaces the base's weights, so that the file by itself does not determine the update.
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
    def parse(cls, text: str, where: str) -> AdapterConfig:
        """Reads ``adapter_config.json`` or diffusers' ``lora_adapter_metadata``.

        Args:
            text: a JSON object; diffusers' ``transformer.`` prefix is removed from its fields.
            where: the place that error messages name.

        Raises:
            CloraError: no JSON object, another adapter type than LoRA, LoHa or LoKr, or a value of the wrong type. An
                option whose update the tensors by themselves do not determine is refused too.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError is raised for integers of thousands of digits too
            raise CloraError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise CloraError(f"{where} must be a JSON object, found {type(values).__name__}")
        values = {key.removeprefix("transformer."): value for key, value in values.items()}
        _refuse_other_adapters(values, where)
        for name in ("rank_pattern", "alpha_pattern"):
            if isinstance(values.get(name), dict):
                _check_pattern(values[name], where)
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
            raise CloraError(f"{where}: r, alpha and their patterns must be numbers ({str(error)[:200]})") from error

    def scale(self, alpha: float, rank: int) -> float:
        """Returns the factor on the update: alpha / rank, or alpha / sqrt(rank) with rank-stabilised LoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def find_config(file: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> AdapterConfig:
    """Reads the config that a LoRA file's writer stated beside the tensors.

    Args:
        file: the weights.
        keys: the names of its tensors.
        metadata: its header's entries.

    Returns:
        The contents of ``adapter_config.json`` for PEFT weights, else of diffusers' metadata entry, else nothing.

    Raises:
        CloraError: as `AdapterConfig.parse`, or the config cannot be read.
    """
    # A folder may hold another adapter's config, so only what is PEFT's by its name or keys is read with it.
    beside = file.with_name(PEFT_CONFIG)
    is_peft = file.name.startswith(PEFT_WEIGHTS) or any(format_of(key) == "peft" for key in keys)
    if is_peft and beside.is_file():
        return AdapterConfig.parse(read_text(beside, "PEFT's adapter config"), str(beside))
    if METADATA_KEY in metadata:
        return AdapterConfig.parse(metadata[METADATA_KEY], f"{METADATA_KEY} of {file}")
    return AdapterConfig()


def _refuse_other_adapters(values: Mapping[str, Any], where: str) -> None:
    kind = values.get("peft_type") or "LORA"
    if kind not in _KINDS:
        raise CloraError(
            f"{where} describes {str(kind)[:80]}, which is not supported; expected one of {', '.join(_KINDS)}"
        )
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REPLACES_BASE):
        raise CloraError(
            f"{where}: with init_lora_weights = {start[:80]!r} the update is relative to a base that PEFT changed, so the "
            "file by itself does not determine it; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    other = [name for name in _OTHER_UPDATES if values.get(name)]
    if other:
        raise CloraError(f"{where}: {', '.join(other)} makes another update than alpha / r * B A; not supported")


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"found {number}")
    return number


def stated(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """Returns a module's entry of `AdapterConfig.rank_pattern` or ``alpha_pattern``, else the default.

    PEFT's rule is the first key that is, as a regular expression, the module's name or a dotted tail of it. A file's
    expression is never run; keys that are names, with the signs that people put around them, mean the same.
    """
    return next((value for key, value in pattern.items() if _fits(key, module)), default)


def _fits(key: str, module: str) -> bool:
    name = key.removesuffix("$").replace("\\.", ".")
    if name.startswith("^"):
        return module == name[1:]
    if name.startswith(".*"):
        return module.endswith(name[2:])
    return f".{module}".endswith(f".{name}")


def _check_pattern(pattern: Mapping[str, Any], where: str) -> None:
    """Raises CloraError for a key that only a regular expression's rules explain."""
    for key in pattern:
        if not re.fullmatch(r"(\^|\.\*)?(\w|-|\.|\\\.)+\$?", key):
            raise CloraError(
                f"{where}: {key[:80]!r} is a regular expression, and clora runs none of a file's; expected names of "
                "modules or ends of them. Write an entry for each module in its place"
            )
