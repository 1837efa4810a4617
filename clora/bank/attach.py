"""Serves many LoRAs from one transformer: one pass of a batch whose samples use different LoRAs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clora.bank.bank import AdapterBank, BankBytes
from clora.bank.slots import index_of
from clora.errors import CloraError
from clora.lora.algebra import MAX_ERROR
from clora.lora.layers import transformer_of
from clora.lora.load import load_lora
from clora.lora.state import LoRAState


class AttachedLoRAs:
    """LoRAs on a transformer, from `attach`.

    Attributes:
        names: the LoRAs' names, in the order in which they were given.
    """

    def __init__(self, transformer: nn.Module, states: Mapping[str, LoRAState]):
        self._bank = AdapterBank(transformer, states)
        self._slots = self._bank.slots()
        self.names = self._bank.names

    @contextmanager
    def route(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, sample i of the transformer's batch runs with LoRA ``names[i]``; for None, with only the base.

        A batch twice as long repeats the names: the prompts, then the negative prompts. A single name is for the whole
        batch.

        Raises:
            CloraError: a name is unknown (the message suggests the nearest), a single text is given, or a pass has a
                batch that does not fit the names.
        """
        if isinstance(names, str):
            raise CloraError(f"expected a list of names, found the text {names!r}; write [{names!r}]")
        ids = [-1 if name is None else index_of(name, self.names) for name in names]
        with self._bank.route(self._slots, torch.tensor(ids, device=self._slots.scale.device)):
            yield

    def bytes(self) -> BankBytes:
        """Returns the memory of the LoRAs."""
        return self._bank.bytes()

    def detach(self) -> None:
        """Restores the transformer's own layers exactly."""
        self._bank.detach()


def attach(
    pipeline_or_transformer: Any, adapters: Mapping[str, str | Path | LoRAState], *, max_error: float = MAX_ERROR
) -> AttachedLoRAs:
    """Puts LoRAs beside a transformer's layers, ready for batches that mix them.

    ::

        bank = clora.attach(pipe.transformer, {"snow": "snow.safetensors", "ink": "ink_folder"})
        with bank.route(["snow", "ink", None]):
            images = pipe(image=image, prompt=[snow_prompt, ink_prompt, prompt]).images
        bank.detach()

    Nothing is merged and nothing is copied between passes. Until `detach`, the transformer runs only inside `route`.

    Args:
        pipeline_or_transformer: a diffusers pipeline or its transformer, also with quantised weights.
        adapters: name to LoRA: a file or folder of any format that `clora.load_lora` reads, or a loaded one. They are
            stored in the transformer's dtype.
        max_error: as in `clora.load_lora`, for files whose changes are not of low rank.

    Raises:
        CloraError: a LoRA cannot be read or does not fit, none is given, or the transformer already carries others.
    """
    if not isinstance(adapters, Mapping):
        found = type(adapters).__name__
        raise CloraError(
            f'expected names and LoRAs as in {{"snow": "snow.safetensors"}}, found {found}; name each LoRA'
        )
    transformer = transformer_of(pipeline_or_transformer)
    states = {
        name: lora if isinstance(lora, LoRAState) else load_lora(lora, transformer, max_error=max_error)
        for name, lora in adapters.items()
    }
    return AttachedLoRAs(transformer, states)
