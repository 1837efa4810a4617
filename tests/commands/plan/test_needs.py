"""The arithmetic of a run's rows, passes, memory and disk, against what small runs really use."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from helpers.pictures import write_images
from helpers.trainers import make_trainer
from safetensors.torch import save_file

from clora.bank.bank import AdapterBank
from clora.bank.pages import stack_bytes, teacher_pages
from clora.bank.slots import module_ranks
from clora.commands.plan.cost import PassCost
from clora.commands.plan.make import make_plan
from clora.commands.plan.needs import (
    Facts,
    bank_bytes,
    disk,
    forward_passes,
    memory,
    rows_with_gradient,
    scoring_rows,
)
from clora.data.prepare import count_data, encode_data
from clora.hashing import digest
from clora.lora.layers import block_layers, linear_shapes
from clora.lora.load import read_lora
from clora.models.loading import load_pipeline, with_guidance
from clora.testing import (
    random_lora,
    random_teachers,
    tiny_adapter,
    tiny_config,
    tiny_pipeline,
)
from clora.training.resume import Checkpoints
from csrc_triton.multi_lora import by_runs

RANK = 4


def facts_of(transformer, teachers):
    ranks = {name: {m: module.rank for m, module in state.modules.items()} for name, state in teachers.items()}
    weights = sum(p.numel() * p.itemsize for p in transformer.parameters())
    return Facts(
        weights, 0, torch.float32, linear_shapes(transformer), block_layers(transformer), ranks, 1, PassCost(0.0, 0, 0)
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_activations_are_those_of_scoring_while_the_students_pass_is_kept(adapter, checkpointed):
    teachers = random_teachers(adapter.pipeline.transformer, 2)
    train = {"batch_size": 2, "gradient_checkpointing": checkpointed}
    config = tiny_config(list(teachers), train=train, sampler={"guidance": 1.0})
    cost = PassCost(flops=0.0, saved=6000, saved_checkpointed=100)
    facts = dataclasses.replace(facts_of(adapter.pipeline.transformer, teachers), cost=cost, blocks=3)
    kept, one_block = (100 if checkpointed else 6000), 2000
    assert memory(facts, config)["activations"] == 3 * 2 * kept + 3 * 2 * 2 * one_block


def gradients_at_each_step(trainer):
    """A list that gets the bytes of all gradients, student's and critic's, at every step of an optimizer."""
    held, factors = [], [*trainer.student.parameters(), *trainer.critic.parameters()]

    def measure(*_):
        held.append(sum(p.grad.numel() * p.grad.itemsize for p in factors if p.grad is not None))

    for optimizer in trainer.optimizers.values():
        optimizer.register_step_pre_hook(measure)
    return held


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}, {"ema_decay": 0.9}], ids=["adamw", "muon", "average"])
def test_memory_is_what_a_small_run_uses(adapter, settings):
    transformer = adapter.pipeline.transformer
    facts = facts_of(transformer, random_teachers(transformer, 3))
    with make_trainer(adapter, train={"updates": 1, **settings}) as trainer:
        planned = memory(facts, trainer.config)
        held = gradients_at_each_step(trainer)
        trainer.fit(lambda update, values: None)
        optimizers = trainer.optimizers.values()
        states = [state for o in optimizers for state in o.state_dict()["state"].values()]
        used = sum(t.numel() * t.itemsize for state in states for t in state.values() if torch.is_tensor(t) and t.ndim)
        average = [] if trainer.average is None else trainer.average.shadow_params
        kept = [*trainer.student.parameters(), *trainer.critic.parameters(), *average]
        stacked = trainer.bank.bytes().device
    assert planned["base"] == sum(p.numel() * p.itemsize for p in transformer.parameters())
    assert planned["student and critic"] == sum(p.numel() * p.itemsize for p in kept)
    assert planned["optimizers"] == used
    assert planned["gradients"] == max(held)
    assert len(held) == 1 + trainer.config.train.critic_ratio
    assert planned["teachers"] == stacked


def test_the_merged_weight_is_the_largest_that_a_pass_makes(adapter, monkeypatch):
    transformer = adapter.pipeline.transformer
    facts = facts_of(transformer, random_teachers(transformer, 3))
    made = []
    own = torch.empty_like

    def empty_like(weight):
        made.append(weight.nbytes)
        return own(weight)

    monkeypatch.setenv("CLORA_DESIGN", "merged")
    monkeypatch.setattr(by_runs.torch, "empty_like", empty_like)
    with make_trainer(adapter, train={"updates": 1}) as trainer:
        planned = memory(facts, trainer.config)
        trainer.fit(lambda update, values: None)
    assert planned["merged weight"] == max(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paged", [False, True])
def test_slots_and_pages_take_what_a_bank_uses(adapter, dtype, paged):
    """Of teachers of other ranks and layers than the critic's."""
    transformer = copy.deepcopy(adapter.pipeline.transformer).to(dtype)
    teachers = random_teachers(transformer, 3)
    facts = dataclasses.replace(facts_of(transformer, teachers), dtype=dtype)
    pair = 2.2e-9 * stack_bytes(facts.shapes, module_ranks(list(facts.teachers.values())), dtype)
    budget = pair if paged else None
    config = tiny_config(list(teachers), student={"rank": RANK}, train={"teacher_memory_gb": budget})
    critic = random_lora(transformer, RANK, 0)
    pages = teacher_pages(budget, transformer, list(teachers.values()))
    with AdapterBank(transformer, {"critic": critic, **teachers}, pages=pages, fixed=1) as bank:
        assert pages == (2 if paged else None)
        assert bank_bytes(facts, config) == bank.bytes().device


def rows_of(transformer, run):
    """Rows of each pass of the transformer, without and with gradient."""
    counted = {False: [], True: []}
    hook = transformer.register_forward_pre_hook(
        lambda module, args, kwargs: counted[torch.is_grad_enabled()].append(len(kwargs["hidden_states"])),
        with_kwargs=True,
    )
    try:
        run()
    finally:
        hook.remove()
    return counted


@pytest.mark.parametrize("gradient_rows", [None, 4])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_passes_and_rows_are_those_of_an_update(adapter, guidance, gradient_rows):
    """Nothing is simulated here and there is no general stream, so that nothing is left to chance."""
    sections = {"sampler": {"steps": 4, "guidance": guidance}, "objective": {"dual_stream": False}}
    with make_trainer(adapter, train={"updates": 1, "gradient_rows": gradient_rows}, **sections) as trainer:
        trainer.steps.simulate = lambda batch: (
            trainer.steps._noise(batch.target),
            trainer.steps.sigmas[:1].expand(len(batch)),
        )
        counted = rows_of(adapter.pipeline.transformer, lambda: trainer.fit(lambda *_: None))
        config = trainer.config
    simulated = 1.5 * config.train.critic_ratio * config.train.batch_size  # what is expected of four steps
    assert sum(counted[False]) + 2 * sum(counted[True]) + simulated == forward_passes(config)
    # The student's prediction, of a pass before the critic's, is kept beside the rest of its rows.
    kept = config.train.batch_size if config.shares_prediction(gradient_rows) else 0
    assert max(counted[True][-1] + kept, *counted[True]) == rows_with_gradient(config)
    assert max(counted[False]) == scoring_rows(config)


def test_an_effects_own_pictures_are_rendered(job, tmp_path):
    """Each teacher renders as many as the one with the most: 3 of its own, against 1 that the others share."""
    write_images(tmp_path / "own", 3)
    effects = [
        {"name": name, "lora": str(tmp_path / "snow.safetensors"), "prompt": "make it snow", "sources": sources}
        for name, sources in (("a", None), ("b", str(tmp_path / "own")))
    ]
    assert make_plan(job(effects, data={"held_out": 3}))["passes"]["rendering"] == 2 * 3 * 2 * 2


@pytest.mark.parametrize("switched_off", [None, "dual_stream", "trajectory_anchoring"])
def test_general_pairs_are_rendered_where_they_are_anchored(job, switched_off):
    objective = {} if switched_off is None else {switched_off: False}
    config = job(data={"general_targets": 5}, objective=objective)
    pictures = 2 * 4 + (5 if switched_off is None else 0)
    assert make_plan(config)["passes"]["rendering"] == pictures * 2 * 2


def test_pictures_that_are_held_out_are_not_rendered(job):
    assert make_plan(job(data={"held_out": 3}))["passes"]["rendering"] == 2 * 1 * 2 * 2


def test_what_is_encoded_is_what_a_run_encodes(job, tiny_folder):
    """Its values, counted in the data that a run would train on; a prompt given twice has one row."""
    config = job(data={"general_targets": 3, "general_instructions": ("make it brighter", "keep the red circle")})
    planned = make_plan(config)["disk"]["encoded while it trains"]
    adapter = tiny_adapter(load_pipeline(str(tiny_folder), "cpu"))
    config = with_guidance(config, adapter)
    shapes = linear_shapes(adapter.pipeline.transformer)
    data = encode_data(config, adapter, {e.name: read_lora(e.lora, shapes) for e in config.effects})
    different = [data.text[:].embeds, data.targets[:], data.general_sources[:], data.general_targets[:]]
    assert planned == sum(4 * t.numel() for t in different)


@pytest.mark.parametrize(("updates", "keep"), [(4, 1), (4, 2), (2, 3)])
def test_checkpoints_are_counted_with_the_one_that_is_written(adapter, tmp_path, monkeypatch, updates, keep):
    train = {"updates": updates, "checkpoint_every": 1, "keep_checkpoints": keep}
    most, remove = 0, Checkpoints.wrote

    def wrote(checkpoints, update):
        nonlocal most
        most = max(most, sum(file.stat().st_size for file in checkpoints.files()))
        remove(checkpoints, update)

    monkeypatch.setattr(Checkpoints, "wrote", wrote)
    with make_trainer(adapter, train=train) as trainer:
        trainer.fit(lambda *_: None, Checkpoints(tmp_path, keep))
        facts = facts_of(
            adapter.pipeline.transformer, {name: trainer.bank.state(name) for name in trainer.data.effects}
        )
        planned = disk(facts, trainer.config, 0)["checkpoints while it trains"]
    # Of a tiny model names and the generator's state are a part of the file.
    assert planned < most < planned + 60_000 * min(keep + 1, updates)


@pytest.mark.parametrize("text_sees_image", [False, True])
def test_the_count_is_of_what_a_run_reads(job, tmp_path, adapter, monkeypatch, text_sees_image):
    """One effect has its own pictures and results, one its own pictures only, one neither."""
    write_images(tmp_path / "before", 3, 1)
    write_images(tmp_path / "after", 3, 2)
    write_images(tmp_path / "own", 7, 3)
    own = [{"sources": "before", "targets": "after"}, {"sources": "own"}, {}]
    effects = [
        {"name": f"e{i}", "lora": "a", "prompt": f"make {i}"} | {key: str(tmp_path / f) for key, f in keys.items()}
        for i, keys in enumerate(own)
    ]
    config = job(effects, data={"held_out": 1, "sources_per_effect": 5})
    seen = {"sources": 0, "prompts": 0, "targets": 0}

    def extend(entries, keys, *how):
        seen[entries._kind] = seen.get(entries._kind, 0) + len(keys)
        entry = {"embeds" if entries._kind == "prompts" else "latents": torch.zeros(1, 1)}
        for key in keys:
            entries._names.append(digest(key))
            entries._keep(entries._names[-1], entry)

    monkeypatch.setattr("clora.data.cache.Entries.extend", extend)
    monkeypatch.setattr(type(adapter), "text_sees_image", text_sees_image)
    encode_data(
        config, adapter, {effect.name: random_lora(tiny_pipeline().transformer, 2, 0) for effect in config.effects}
    )
    assert count_data(config, text_sees_image) == (seen["sources"], seen["prompts"], seen["targets"])


def test_pictures_that_cannot_be_counted_are_left_out_with_a_note(job):
    found = make_plan(job(data={"sources": "nowhere"}))
    assert "data.sources: nowhere: expected a folder of images, found nothing" in found["problems"]
    assert "is not counted: pictures or instructions cannot be read" in found["notes"][0]
    assert found["passes"]["rendering"] == 0
    assert found["memory"]["peak"] > 0


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_part_takes_what_its_files_or_its_bits_take(job, tmp_path, tiny_folder, bits, part):
    folder, name = tmp_path / "quantised", "base" if part == "transformer" else "encoders"
    shutil.copytree(tiny_folder, folder)
    full = make_plan(job(pipeline=str(folder)))["memory"][name]
    config = json.loads((folder / part / "config.json").read_text("utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
    (folder / part / "config.json").write_text(json.dumps(config), "utf-8")
    (file,) = (folder / part).glob("*.safetensors")
    save_file({"packed": torch.zeros(5000, dtype=torch.uint8)}, file)
    whole = getattr(tiny_pipeline(), part)
    unquantised = sum(t.numel() * t.itemsize for t in (*whole.parameters(), *whole.buffers()))
    found = make_plan(job(pipeline=str(folder)))
    assert found["problems"] == []
    assert found["memory"][name] == full - unquantised + file.stat().st_size
    file.unlink()
    layers = {n: m for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    linear = sum(layer.weight.numel() for layer in layers.values())
    assert make_plan(job(pipeline=str(folder)))["memory"][name] == full - linear * (32 - bits) // 8
