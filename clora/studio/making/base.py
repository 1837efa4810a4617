"""The studio's base model: a tiny FLUX.2 [klein] transformer trained on general edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from clora.flow.matching import flow_matching_losses
from clora.hashing import tensor_digest
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.edits import FAMILIES, Edit, drawing, sample_edit, scattering, tones
from clora.studio.effects.marks import CELL
from clora.studio.making.optimizers import RATES, make_optimizers, rate_factor, resume
from clora.studio.photographs import Photographs
from clora.studio.pixels import to_tensor
from clora.studio.precision import ReducedAdapter
from clora.studio.scenes import make_scene
from clora.studio.text import MAX_SEQUENCE_LENGTH
from clora.training.checkpoint import save_state

Prepared = TypeVar("Prepared")
Encoder = Callable[[Tensor], Tensor]

EMPTY_PROMPT_SHARE = 0.1
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 250
WARM_UP = 50
DECAY = 0.4
"""Last share of a part, over which the learning rates fall to zero."""
FITTED = 32
"""Pictures from which the encoder's linear map is found."""
SHIFT = 5.0
"""Of the noise levels: more than the pipeline's 3, since what an edit changes is decided where there is most noise."""
ROWS = {64: 24, 128: 8}
"""Of an update, by the side of its pictures."""
TEXT_LENGTHS = (40, MAX_SEQUENCE_LENGTH, 40)
"""Positions of the text, padding included, of updates in turn: a pipeline may be called with either."""
FOCUS = {
    **dict.fromkeys(tones.FAMILIES, 0.5),
    **dict.fromkeys(drawing.FAMILIES, 1.5),
    **dict.fromkeys(scattering.FAMILIES, 1.5),
    **dict.fromkeys(("levels", "mesh", "stripes", "three_tones", "two_tones"), 2.5),
    **dict.fromkeys(("edges", "background", "add_shape"), 5.0),
    **dict.fromkeys(("recolour", "remove"), 9.0),
    "add_thing": 0.5,
}
"""How often each kind of edit is drawn in the second part: most often those that came out worst."""
LARGE_FOCUS = {
    **FOCUS,
    **dict.fromkeys(("half", "fade_side", "border", "add_shape"), 3.0),
    **dict.fromkeys(("stripes", "mesh"), 4.0),
    "flip": 6.0,
    **dict.fromkeys(("recolour", "remove"), 6.0),
}
"""How often each kind is drawn in the third part: most often what came out worst at 128 x 128."""
LAST_FOCUS = FOCUS | dict.fromkeys(tones.FAMILIES, 1.3) | dict.fromkeys(("recolour", "remove"), 7.0)
"""How often each kind is drawn in the last part: tones, which had become worse in the third, more often again."""


class Phase(NamedTuple):
    """A part of the training, with a checkpoint and a schedule of its own.

    Attributes:
        updates: their number.
        fixed: so many of the first draw only edits whose instruction names no colour or object, so that the transformer soon
            listens to its text.
        small: the share of updates on 64 x 64 only; then ``sizes`` take turns.
        shares: kind of edit to how often it is drawn; None for the kinds' own shares.
        sizes: sides of the pictures of updates in turn.
        rate: by which the learning rates are multiplied.
    """

    updates: int
    fixed: int = 0
    small: float = 0.0
    shares: Mapping[str, float] | None = None
    sizes: tuple[int, ...] = (64, 128)
    rate: float = 1.0


PHASES = (
    Phase(7500, fixed=200, small=2 / 3),
    Phase(4600, small=0.6, shares=FOCUS),
    Phase(1000, shares=LARGE_FOCUS, sizes=(64, 128, 128, 128)),
    Phase(800, shares=LAST_FOCUS, rate=0.6),
)


def make_transformer():
    """Makes an untrained ``Flux2Transformer2DModel`` of 1 + 3 blocks, 4 heads x 64 (5.5M parameters).

    Modulation and output layers start at zero, so that every block starts as the identity (DiT, "adaLN-Zero").
    """
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=96,
        timestep_guidance_channels=64,
        axes_dims_rope=(16, 16, 16, 16),
        guidance_embeds=False,
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("proj_out", "norm_out.linear")):
            torch.nn.init.zeros_(parameter)
    return transformer


def pipeline_digest(pipeline, parts: Sequence[str]) -> str:
    """Returns the hash of the weights of some parts, on which the training of a checkpoint depends."""
    states = {part: getattr(pipeline, part).state_dict() for part in parts}
    return tensor_digest({f"{part}.{key}": tensor for part, state in states.items() for key, tensor in state.items()})


def families_without_slots() -> dict[str, float]:
    """Returns the kinds of edit whose instructions name no colour or object, with equal shares."""
    return {name: 1.0 for name, family in FAMILIES.items() if "{" not in "".join(family.phrasings)}


def draw_edits(
    size: int,
    rng: np.random.Generator,
    shares: Mapping[str, float] | None = None,
    photographs: Photographs | None = None,
) -> list[Edit]:
    """Draws the edits of an update, one of each of its scenes; ``shares`` as in `Phase`."""
    names = None if shares is None else [*shares]
    weights = None if shares is None else np.array([*shares.values()]) / sum(shares.values())
    edits = []
    for _ in range(ROWS[size]):
        family = None if names is None else str(rng.choice(names, p=weights))
        scene = make_scene(int(rng.integers(1 << 62)), "train", 1, photographs)
        edits.append(sample_edit(scene, rng, family, size, photographs))
    return edits


def edits_digest(photographs: Photographs) -> str:
    """Returns the hash of some edits, with which that of all changes where kinds of edit, scenes or photographs do."""
    edits = [
        sample_edit(make_scene(i, "train", 1, photographs), np.random.default_rng(i), name, 64, photographs)
        for i, name in enumerate(FAMILIES)
    ]
    pictures = {f"{i}.{edit.instruction}": torch.from_numpy(edit.result) for i, edit in enumerate(edits)}
    return tensor_digest(pictures)


def train_base(
    pipeline,
    phase: Phase,
    seed: int,
    checkpoint: Path,
    photographs: Photographs,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Trains the pipeline's transformer by flow matching on edits, none of them twice; leaves its averaged weights in it.

    One prompt in ten is empty, for guidance. Resumes from ``checkpoint`` if it exists.
    """
    updates = phase.updates
    transformer = pipeline.transformer.train().requires_grad_(True)
    adapters = {(size, length): ReducedAdapter(pipeline, size, length) for size in ROWS for length in TEXT_LENGTHS}
    parameters = dict(transformer.named_parameters())
    optimizers = make_optimizers(parameters)
    generator = torch.Generator().manual_seed(seed)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    # A checkpoint belongs to one recipe.
    recipe = {
        "phase": str(phase),
        "seed": seed,
        "rows": str(ROWS),
        "shift": SHIFT,
        "edits": edits_digest(photographs),
        "pipeline": pipeline_digest(pipeline, ("transformer", "vae", "text_encoder")),
    }
    # Views of all that training changes: read by checkpoints, written by a resumed run.
    state = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    state |= {f"average.{name}": weight for name, weight in average.items()}
    encode = linear_encoder(adapters[64, MAX_SEQUENCE_LENGTH])
    empty = adapters[64, MAX_SEQUENCE_LENGTH].encode_prompts([""]).embeds[0]

    def prepare(update: int) -> tuple[Flux2KleinAdapter, Batch]:
        size = phase.sizes[update % len(phase.sizes)] if update >= phase.small * updates else 64
        shares = families_without_slots() if update < phase.fixed else phase.shares
        edits = draw_edits(size, np.random.default_rng([seed, update, 3]), shares, photographs)
        batch = encode_edits(adapters[size, MAX_SEQUENCE_LENGTH], encode, edits)
        length = TEXT_LENGTHS[update % len(TEXT_LENGTHS)]
        return adapters[size, length], batch._replace(text=batch.text[:, :length])

    for update, (adapter, batch) in ahead(
        prepare, range(resume(checkpoint, state, optimizers, generator, recipe), updates)
    ):
        loss = _loss(adapter, batch, empty, generator)
        _step(loss, parameters, optimizers, phase.rate * rate_factor(update, updates, WARM_UP, DECAY))
        # A plain mean of all weights so far, until the decay gives the last ones more weight.
        share = max(1 - EMA_DECAY, 1 / (update + 1))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], share)
        report(update + 1, {"loss": float(loss.detach())})
        if (update + 1) % CHECKPOINT_EVERY == 0 or update + 1 == updates:
            save_state(checkpoint, state, optimizers, generator, {"update": update + 1, "recipe": recipe})
    for name, weight in average.items():
        parameters[name].data.copy_(weight)
    transformer.eval().requires_grad_(False)


def _step(
    loss: Tensor, parameters: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer], factor: float
) -> None:
    """Makes one update of the parameters, at ``factor`` times the learning rates."""
    for name, optimizer in optimizers.items():
        optimizer.param_groups[0]["lr"] = RATES[name] * factor
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()


class Batch(NamedTuple):
    """Encoded edits, on the CPU: ``sources`` and ``targets [N, T, C]``, embedded instructions ``text [N, L, D]``."""

    sources: Tensor
    targets: Tensor
    text: Tensor


def linear_encoder(adapter: Flux2KleinAdapter) -> Encoder:
    """Returns one product ``[N, 3, H, W] -> [N, T, 128]`` that stands in for the autoencoder's encoder.

    The encoder is linear but for a relative error of .004 (`clora.studio.making.linear_encoder`), and its network took
    most of the time of an edit. A token is a map of the 8 x 8 pixels under it, found by least squares.
    """

    def patches(pictures: Tensor) -> Tensor:
        pixels = nn.functional.pixel_unshuffle(pictures, CELL).flatten(2).mT
        return torch.cat([pixels, pixels.new_ones(*pixels.shape[:2], 1)], dim=-1)

    noise = 0.3 * torch.randn(FITTED, 3, *adapter.size, generator=torch.Generator().manual_seed(0))
    latents = adapter.encode_images(noise).cpu()
    # In fp64: the last digits of an fp32 solution depend on where its memory lies.
    weight = torch.linalg.lstsq(*(x.flatten(0, 1).double() for x in (patches(noise), latents))).solution.float()
    return lambda pictures: patches(pictures) @ weight


def encode_edits(adapter: Flux2KleinAdapter, encode: Encoder, edits: Sequence[Edit]) -> Batch:
    """Encodes the edits of an update."""
    text = adapter.encode_prompts([edit.instruction for edit in edits]).embeds
    pictures = np.stack([edit.source for edit in edits] + [edit.result for edit in edits])
    sources, targets = encode(to_tensor(pictures)).split(len(edits))
    return Batch(sources, targets, text)


def ahead(prepare: Callable[[int], Prepared], updates: range) -> Iterator[tuple[int, Prepared]]:
    """Yields each update with what it needs, which a thread prepares while the update before it runs."""
    with ThreadPoolExecutor(1) as pool:
        waiting = {update: pool.submit(prepare, update) for update in updates[:1]}
        for update in updates:
            found = waiting.pop(update).result()
            if update + 1 in updates:
                waiting[update + 1] = pool.submit(prepare, update + 1)
            yield update, found


def _loss(adapter: Flux2KleinAdapter, batch: Batch, empty: Tensor, generator: torch.Generator) -> Tensor:
    """Computes the loss of an update's edits; ``empty`` is the embedded empty prompt ``[L, D]``."""
    dropped = torch.rand(len(batch.text), generator=generator) < EMPTY_PROMPT_SHARE
    text = Text(torch.where(dropped[:, None, None], empty[: batch.text.shape[1]], batch.text))
    device = adapter.pipeline.transformer.device
    conditioning = Conditioning(text, batch.sources).to(device)

    losses = flow_matching_losses(
        lambda x, sigma: adapter.velocity(x, sigma, conditioning), batch.targets.to(device), SHIFT, generator
    )
    return losses.mean()
