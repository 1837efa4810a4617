"""The studio's base model: a tiny FLUX.2 [klein] transformer trained on general edits."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clora.flow.matching import flow_matching_losses
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.studio.edits import FAMILIES, sample_edit
from clora.studio.making.optimizers import RATES, make_optimizers, resume
from clora.studio.pixels import to_tensor
from clora.studio.scenes import make_scene, render
from clora.training.checkpoint import save_state

BATCH = 16
EMPTY_PROMPT_SHARE = 0.1
EMA_DECAY = 0.998
CHECKPOINT_EVERY = 250
FIXED_UPDATES = 200
FOCUS_UPDATES = 800
FOCUS_FAMILIES = ("recolour", "recolour_all", "remove", "outline")


def make_transformer():
    """Makes an untrained ``Flux2Transformer2DModel`` of 1 + 3 blocks, 6 heads x 32 (3.1M parameters).

    Modulation and output layers start at zero, so that every block starts as the identity (DiT, "adaLN-Zero").
    """
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=96,
        timestep_guidance_channels=64,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name.startswith(("proj_out", "norm_out.linear")):
            torch.nn.init.zeros_(parameter)
    return transformer


@dataclass(frozen=True)
class Pool:
    """Encoded training edits, K of them: the same number of each of N scenes, scene by scene.

    Attributes:
        sources: ``[N, 64, 128]`` fp16.
        targets: ``[K, 64, 128]`` fp16.
        instructions: K.
        families: K kinds of edit.
    """

    sources: Tensor
    targets: Tensor
    instructions: list[str]
    families: list[str]

    def entries(self, families: Container[str]) -> Tensor:
        """Returns the indices of the edits of these families."""
        return torch.tensor([i for i, family in enumerate(self.families) if family in families])


def families_without_slots() -> set[str]:
    """Returns the kinds of edit whose instructions name no colour or shape."""
    return {name for name, family in FAMILIES.items() if "{" not in "".join(family.phrasings)}


def make_pool(adapter: Flux2KleinAdapter, scenes: range, edits: int, report: Callable[[int], None]) -> Pool:
    """Renders and encodes ``edits`` edits of every scene in ``scenes`` (scene seeds); ``report(n)`` after n more."""
    sources, targets = [], []
    instructions, families = [], []
    for start in range(0, len(scenes), 64):
        seeds = scenes[start : start + 64]
        rng = np.random.default_rng([seeds.start, 3])
        # Only the texts of an edit are kept: its picture is encoded with those of 64 scenes.
        images, results = [], []
        for scene in map(make_scene, seeds):
            some = [sample_edit(scene, rng) for _ in range(edits)]
            images.append(render(scene))
            results += [edit.result for edit in some]
            instructions += [edit.instruction for edit in some]
            families += [edit.family for edit in some]
        sources.append(adapter.encode_images(to_tensor(np.stack(images))).half())
        targets.append(adapter.encode_images(to_tensor(np.stack(results))).half())
        report(len(seeds))
    return Pool(torch.cat(sources), torch.cat(targets), instructions, families)


def train_base(
    adapter: Flux2KleinAdapter,
    pool: Pool,
    updates: int,
    seed: int,
    checkpoint: Path,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Trains the pipeline's transformer by flow matching on the pool and leaves its averaged weights in it.

    The first updates draw only edits whose instruction names no colour or shape, so that the transformer soon listens
    to its text; the last draw every second one from the families that come out worst. One prompt in ten is empty, for
    guidance. Resumes from ``checkpoint`` if it exists.
    """
    transformer = adapter.pipeline.transformer.train().requires_grad_(True)
    parameters = dict(transformer.named_parameters())
    optimizers = make_optimizers(parameters)
    generator = torch.Generator().manual_seed(seed)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    # [L, D] of every instruction, and of the empty prompt.
    prompts = sorted({*pool.instructions, ""})
    embeddings = dict(zip(prompts, adapter.encode_prompts(prompts).embeds, strict=True))
    # A checkpoint belongs to one recipe and one pool, of which the norms stand for the values.
    recipe = {
        "updates": updates,
        "seed": seed,
        "sources": f"{pool.sources.float().norm():.6g}",
        "text": f"{sum(float(e.norm()) for e in embeddings.values()):.6g}",
    }
    # Views of all that training changes: read by checkpoints, written by a resumed run.
    state = {f"weight.{name}": p.detach() for name, p in parameters.items()}
    state |= {f"average.{name}": weight for name, weight in average.items()}
    start = resume(checkpoint, state, optimizers, generator, recipe)
    everything, focus, fixed = map(pool.entries, (FAMILIES, FOCUS_FAMILIES, families_without_slots()))
    for update in range(start, updates):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = RATES[name] * learning_rate_factor(update, updates)
            optimizer.zero_grad(set_to_none=True)
        last = focus if update >= updates - FOCUS_UPDATES and update % 2 else everything
        loss = _loss(adapter, pool, fixed if update < FIXED_UPDATES else last, embeddings, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        # A plain mean of all weights so far, until the decay gives the last ones more weight.
        share = max(1 - EMA_DECAY, 1 / (update + 1))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], share)
        report(update + 1, {"loss": float(loss.detach())})
        if (update + 1) % CHECKPOINT_EVERY == 0:
            save_state(checkpoint, state, optimizers, generator, {"update": update + 1, "recipe": recipe})
    for name, weight in average.items():
        parameters[name].data.copy_(weight)
    transformer.eval().requires_grad_(False)


def learning_rate_factor(update: int, updates: int) -> float:
    """Linear warm-up over 50 updates, flat, linear decay to zero over the last 40 %; the last updates decay from 40 % once more."""
    main = updates - FOCUS_UPDATES
    if update >= main:
        return 0.4 * (updates - update) / FOCUS_UPDATES
    return min((update + 1) / 50, 1.0, (main - update) / (0.4 * main))


def _loss(
    adapter: Flux2KleinAdapter,
    pool: Pool,
    entries: Tensor,
    embeddings: dict[str, Tensor],
    generator: torch.Generator | None,
) -> Tensor:
    # Rows of a batch are edits of any scenes, drawn with replacement.
    edits = entries[torch.randint(len(entries), (BATCH,), generator=generator)]
    dropped = torch.rand(BATCH, generator=generator) < EMPTY_PROMPT_SHARE
    prompts = ["" if drop else pool.instructions[i] for i, drop in zip(edits, dropped, strict=True)]
    device = adapter.pipeline.transformer.device
    text = Text(torch.stack([embeddings[prompt] for prompt in prompts]))
    x0 = pool.targets[edits].float().to(device)
    # Edits lie scene by scene in the pool.
    scenes = edits // (len(pool.targets) // len(pool.sources))
    conditioning = Conditioning(text, pool.sources[scenes].float()).to(device)
    return flow_matching_losses(lambda x, s: adapter.velocity(x, s, conditioning), x0, 3.0, generator).mean()
