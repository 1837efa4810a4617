"""clora: many effect LoRAs and few-step sampling in one LoRA.

Importing it is quick and imports neither torch nor diffusers: a name is loaded when it is first used. Distil with
``clora.distill.distill(clora.load_config("config.yaml"))``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clora.adapter_bank import AdapterBank
    from clora.config import DistillConfig, load_config
    from clora.effects import Effects, apply, load_collection
    from clora.errors import CloraError
    from clora.lora.files import load_lora
    from clora.lora.inspect import inspect_lora
    from clora.serving import attach

__version__ = "0.1.0"

__all__ = [
    "AdapterBank",
    "CloraError",
    "DistillConfig",
    "Effects",
    "apply",
    "attach",
    "inspect_lora",
    "load_collection",
    "load_config",
    "load_lora",
]

_MODULES = {
    "AdapterBank": "clora.adapter_bank",
    "CloraError": "clora.errors",
    "DistillConfig": "clora.config",
    "Effects": "clora.effects",
    "apply": "clora.effects",
    "attach": "clora.serving",
    "inspect_lora": "clora.lora.inspect",
    "load_collection": "clora.effects",
    "load_config": "clora.config",
    "load_lora": "clora.lora.files",
}
# `clora.distill` is always the module: a function of that name would turn into it at the module's first import.
_SUBMODULES = frozenset({"distill"})


def __getattr__(name: str) -> Any:
    """Loads a public name at its first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"clora.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'clora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
