"""Serves many LoRAs from one transformer: one pass of a batch whose samples use different LoRAs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from clora.bank.bank import AdapterBank, BankBytes
from clora.bank.slots import Slots, Stack, index_of
from clora.errors import CloraError
from clora.lora.algebra import MAX_ERROR
from clora.lora.layers import check_called, transformer_of
from clora.lora.load import load_lora
from clora.lora.state import LoRAState

MAX_STRENGTH = 1000.0
SCALED_BY = ("attention_kwargs", "joint_attention_kwargs")
"""Arguments of transformers in which pipelines pass a scale of LoRAs."""


class AttachedLoRAs:
    """LoRAs on a transformer, from `attach`.

    Attributes:
        names: the LoRAs' names, in the order in which they were given.
    """

    def __init__(self, transformer: nn.Module, states: Mapping[str, LoRAState]):
        self._layers = tuple(dict.fromkeys(chain.from_iterable(state.modules for state in states.values())))
        check_called(transformer, self._layers)
        self._bank = AdapterBank(transformer, states)
        self._slots = self._bank.slots()
        self._hook = transformer.register_forward_pre_hook(self._take_scale, with_kwargs=True)
        self.names = self._bank.names

    @contextmanager
    def route(self, names: Sequence[str | tuple[str, float] | None]) -> Iterator[None]:
        """Inside, sample i of the transformer's batch runs with LoRA ``names[i]``; for None, with only the base.

        ``("snow", 0.5)`` is LoRA ``snow`` at half strength. The pipeline's own scale (``attention_kwargs={"scale": 0.5}``)
        multiplies all strengths.

        A single name is for the whole batch. Otherwise the names are those of the batch's samples, in its order:

        - several pictures of a prompt are neighbours: ``["a", "a", "b", "b"]`` for two of each of two prompts;
        - a pipeline that runs negative prompts in the same pass (Z-Image) has them after all prompts: ``["a", "b", "a", "b"]``.

        Raises:
            CloraError: a name is unknown (the message suggests the nearest), a strength is no number or an absurd one, a
                single text or anything else but names is given, projections were fused since `attach`, or a pass has a
                batch that does not fit the names.
        """
        if isinstance(names, str):
            raise CloraError(f"expected a list of names, found the text {names!r}; write [{names!r}]")
        if not len(names):
            raise CloraError(
                "expected a name for each sample of the batch, found none; None runs one with only the base"
            )
        check_called(self._bank.transformer, self._layers)
        wanted = [None if name is None else self._lora_and_strength(name) for name in names]
        with self._bank.route(*self._routed(wanted)):
            yield

    def _lora_and_strength(self, entry: str | tuple[str, float]) -> tuple[int, float]:
        """Returns the number of a LoRA, and its strength."""
        match entry:
            case str(name):
                strength: Any = 1.0
            case (str(name), strength):
                pass
            case _:
                raise CloraError(
                    f'expected a name, a pair as in ("snow", 0.5) or None for each sample, found {entry!r}'
                )
        check_strength(f"the strength of {name!r}", strength)
        return index_of(name, self.names), float(strength)

    def _routed(self, wanted: Sequence[tuple[int, float] | None]) -> tuple[Slots, list[int]]:
        """Returns slots with the strengths of a batch, and the slot of each sample."""
        pairs = list(dict.fromkeys(pair for pair in wanted if pair is not None))
        # Strengths are the scales of a stack. A LoRA's second strength is the scale of a second stack of the same factors.
        stacks: dict[tuple[int, int], Stack] = {}
        places = {}
        strengths: Counter[int] = Counter()
        for slot, (lora, strength) in enumerate(pairs):
            stack, row = self._slots.places[lora]
            key = (stack, strengths[lora])
            strengths[lora] += 1
            own = self._slots.stacks[stack]
            if key not in stacks:
                stacks[key] = replace(own, scale=own.scale.clone())
            stacks[key].scale[row] = strength
            if abs(strength) < 1:  # weaker than it was measured: nothing is merged in 16 bits
                stacks[key] = replace(stacks[key], strengths={})
            places[slot] = (list(stacks).index(key), row)
        slots = Slots(tuple(self.names[lora] for lora, _ in pairs), tuple(stacks.values()), places)
        return slots, [-1 if pair is None else pairs.index(pair) for pair in wanted]

    def _take_scale(self, transformer: nn.Module, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> None:
        """Multiplies the strengths by the scale of a pipeline's call, which diffusers gives only to PEFT's layers."""
        running = self._bank.running
        if running is None:
            return
        strength = 1.0
        for name in SCALED_BY:
            scale = (inputs.get(name) or {}).get("scale", 1.0)
            check_strength(f"{name}['scale']", scale)
            strength = scale if scale != 1.0 else strength
        running.strengthen(strength)

    def bytes(self) -> BankBytes:
        """Returns the memory of the LoRAs."""
        return self._bank.bytes()

    def detach(self) -> None:
        """Restores the transformer's own layers exactly."""
        self._hook.remove()
        self._bank.detach()


def attach(
    pipeline_or_transformer: Any, adapters: Mapping[str, str | Path | LoRAState], *, max_error: float = MAX_ERROR
) -> AttachedLoRAs:
    """Puts LoRAs beside a transformer's layers, ready for batches that mix them.

    ::

        bank = clora.attach(pipe.transformer, {"snow": "snow.safetensors", "ink": "ink_folder"})
        with bank.route(["snow", ("ink", 0.5), None]):  # ink at half strength, then the base
            images = pipe(image=image, prompt=[snow_prompt, ink_prompt, prompt]).images
        bank.detach()

    The transformer's weights stay as they are, and nothing is copied between passes. Until `detach`, the transformer runs only inside `route`.

    Args:
        pipeline_or_transformer: a diffusers pipeline or its transformer, also compiled or with quantised weights.
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


def check_strength(what: str, value: Any) -> None:
    """Refuses what is no strength of a LoRA.

    Raises:
        CloraError: it is not a number of at most `MAX_STRENGTH`, of either sign.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not abs(value) <= MAX_STRENGTH:
        raise CloraError(f"{what}: expected a number of at most {MAX_STRENGTH:.0f} of either sign, found {value!r}")
