"""clora: many effect LoRAs and few-step sampling in one LoRA.

Importing it is quick and imports neither torch nor diffusers: a name is loaded when it is first used. Distil with
``clora.commands.distill.distill(clora.load_config("config.yaml"))``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clora.version import __version__ as __version__

if TYPE_CHECKING:
    from clora.bank.attach import attach
    from clora.bank.bank import AdapterBank
    from clora.collection.apply import Effects, apply, load_collection
    from clora.config.settings import DistillConfig, load_config
    from clora.errors import CloraError
    from clora.lora.inspect import inspect_lora
    from clora.lora.load import load_lora


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
    "AdapterBank": "clora.bank.bank",
    "CloraError": "clora.errors",
    "DistillConfig": "clora.config.settings",
    "Effects": "clora.collection.apply",
    "apply": "clora.collection.apply",
    "attach": "clora.bank.attach",
    "inspect_lora": "clora.lora.inspect",
    "load_collection": "clora.collection.apply",
    "load_config": "clora.config.settings",
    "load_lora": "clora.lora.load",
}
# `clora.commands.distill` is always the module: a function of that name would turn into it at the module's first import.
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
