"""clora: many effect LoRAs and few-step sampling in one LoRA.

Distil (what ``clora distill my.yaml`` does)::

    import clora

    config = clora.load_config("my.yaml", ["train.updates=500"])
    folder = clora.distill(config)

and use the result in a stock diffusers pipeline::

    effects = clora.apply(pipe, folder)
    image = pipe(image=source, **effects["snow"]).images[0]

Functions:
    load_config: reads a YAML file into a `DistillConfig`.
    distill: runs the whole job of a config; returns the collection's folder.
    load_collection: reads the `Effects` of a collection, without a pipeline.
    apply: loads a collection into a stock pipeline; returns its `Effects`.
    attach: puts many LoRAs beside a transformer, for batches in which each sample has its own.
    inspect: describes a LoRA file of any format.
    load_lora: reads a LoRA file of any format.

Classes:
    DistillConfig: the settings of a distillation, validated and frozen.
    Effects: the effects of a collection; ``effects["snow"]`` is what to call the pipeline with.
    CloraError: a mistake that the user can mend; the message states what to do.

``import clora`` is quick, and imports neither torch nor diffusers: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from clora.version import __version__ as __version__

# Twice the same table: for type checkers and editors, which do not run `__getattr__`, and for Python. A name imported as
# itself is public to type checkers.
if TYPE_CHECKING:
    from clora.bank.attach import attach as attach
    from clora.collection.apply import Effects as Effects
    from clora.collection.apply import apply as apply
    from clora.collection.apply import load_collection as load_collection
    from clora.commands.distill import distill as distill
    from clora.config.settings import DistillConfig as DistillConfig
    from clora.config.settings import load_config as load_config
    from clora.errors import CloraError as CloraError
    from clora.lora.inspect import inspect as inspect
    from clora.lora.load import load_lora as load_lora
else:
    _MODULES = {
        "CloraError": "clora.errors",
        "DistillConfig": "clora.config.settings",
        "Effects": "clora.collection.apply",
        "apply": "clora.collection.apply",
        "attach": "clora.bank.attach",
        "distill": "clora.commands.distill",
        "inspect": "clora.lora.inspect",
        "load_collection": "clora.collection.apply",
        "load_config": "clora.config.settings",
        "load_lora": "clora.lora.load",
    }
    __all__ = list(_MODULES)

    def __getattr__(name: str) -> object:
        """Loads a public name at its first use (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module 'clora' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return [*__all__, "__doc__", "__version__"]
