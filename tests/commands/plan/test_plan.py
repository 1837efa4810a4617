"""``clora plan``: its arithmetic against what small models really use, and its problems, all at once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from math import prod

import diffusers
import pytest
import torch
from helpers import tiny_flux, tiny_longcat, tiny_qwen_image, tiny_z_image
from helpers.pictures import write_images
from helpers.trainers import make_trainer
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from clora.bank.bank import AdapterBank
from clora.bank.recompute import recomputed_blocks
from clora.cli import app
from clora.commands.plan.cost import PassCost, count_blocks, device_memory, pass_cost, source_rows
from clora.commands.plan.make import _parameters, make_plan
from clora.commands.plan.needs import (
    Facts,
    forward_passes,
    memory,
    num_slots,
    rows_with_gradient,
    scoring_rows,
    slot_bytes,
)
from clora.data.prepare import count_data, encode_data
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora
from clora.lora.save import save_diffusers_lora
from clora.models import adapter_for, linear_names
from clora.models.conditioning import Conditioning, Text
from clora.models.families.flux2 import Flux2KleinAdapter
from clora.models.loading import load_pipeline, skeleton, with_guidance
from clora.testing import (
    MAX_SEQUENCE_LENGTH,
    SIZE,
    random_lora,
    random_teachers,
    tiny_adapter,
    tiny_config,
    tiny_pipeline,
)

RANK = 4


@pytest.fixture
def job(tmp_path, tiny_folder):
    """Returns job(**sections): a config of two teachers whose files exist."""
    transformer = tiny_pipeline().transformer
    for name, rank in (("snow", 2), ("sepia", 8)):
        save_diffusers_lora(random_lora(transformer, rank, rank), tmp_path / f"{name}.safetensors")
    write_images(tmp_path / "images", 4)

    def make(effects=None, **sections):
        names = ("snow", "sepia")
        listed = [{"name": n, "lora": str(tmp_path / f"{n}.safetensors"), "prompt": "make it snow"} for n in names]
        data = {"sources": str(tmp_path / "images"), **sections.pop("data", {})}
        defaults = {"pipeline": str(tiny_folder), "output": str(tmp_path / "out"), "student": {"rank": RANK}}
        return tiny_config(effects or listed, data=data, **(defaults | sections))

    return make


def saved_bytes(transformer, run):
    """Bytes that a real pass keeps for its gradient, weights not counted."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, lasting = run()
    for tensor in (*transformer.parameters(), *lasting):
        kept.pop(tensor.untyped_storage()._cdata, None)
    del output
    return sum(kept.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_pass_on_fake_tensors_keeps_what_a_real_one_keeps(tiny_folder, adapter, checkpointed):
    pipeline = skeleton(str(tiny_folder), torch.float32)
    bare = Flux2KleinAdapter(pipeline, SIZE, MAX_SEQUENCE_LENGTH)
    assert count_blocks(pipeline.transformer) == 2
    cost = pass_cost(bare, linear_names(pipeline.transformer), RANK, (MAX_SEQUENCE_LENGTH, 24))
    transformer = adapter.pipeline.transformer
    with AdapterBank(transformer, {"student": random_lora(transformer, RANK, 0)}) as bank:

        def run():
            slots = bank.slots(trainable=True)
            source = torch.zeros(1, *adapter.latent_shape)
            conditioning = Conditioning(Text(torch.zeros(1, MAX_SEQUENCE_LENGTH, 24)), source)
            with bank.route(slots, torch.zeros(1, dtype=torch.int64)):
                return adapter.velocity(source, torch.zeros(1), conditioning), slots.parameters()

        if checkpointed:
            with recomputed_blocks(bank):
                real = saved_bytes(transformer, run)
        else:
            real = saved_bytes(transformer, run)
    assert real == (cost.saved_checkpointed if checkpointed else cost.saved)
    assert cost.saved_checkpointed < cost.saved / 3
    tokens = MAX_SEQUENCE_LENGTH + 32
    products = 2 * tokens * sum(p.numel() for p in transformer.parameters() if p.ndim == 2)
    assert products / 3 < cost.flops < 2 * products


def facts_of(transformer, teachers):
    ranks = {name: {m: module.rank for m, module in state.modules.items()} for name, state in teachers.items()}
    weights = sum(p.numel() * p.itemsize for p in transformer.parameters())
    return Facts(
        weights, 0, torch.float32, linear_shapes(transformer), linear_names(transformer), ranks, 1, PassCost(0.0, 0, 0)
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

    for optimizer in (trainer.student_optimizer, trainer.critic_optimizer):
        optimizer.register_step_pre_hook(measure)
    return held


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_is_what_a_small_run_uses(adapter, optimizer):
    transformer = adapter.pipeline.transformer
    facts = facts_of(transformer, random_teachers(transformer, 3))
    with make_trainer(adapter, train={"optimizer": optimizer, "updates": 1}) as trainer:
        planned = memory(facts, trainer.config)
        held = gradients_at_each_step(trainer)
        trainer.fit(lambda update, values: None)
        optimizers = (trainer.student_optimizer, trainer.critic_optimizer)
        states = [state for o in optimizers for state in o.state_dict()["state"].values()]
        used = sum(t.numel() * t.itemsize for state in states for t in state.values() if torch.is_tensor(t) and t.ndim)
        trained = sum(p.numel() * p.itemsize for p in (*trainer.student.parameters(), *trainer.critic.parameters()))
        stacked = trainer.bank.bytes().device
    assert planned["base"] == sum(p.numel() * p.itemsize for p in transformer.parameters())
    assert planned["student and critic"] == trained
    assert planned["optimizers"] == used
    assert planned["gradients"] == max(held)
    assert len(held) == 1 + trainer.config.train.critic_ratio
    assert planned["teachers"] == 4 * slot_bytes(facts, RANK) == stacked
    paged = trainer.config.model_copy(
        update={
            "train": trainer.config.train.model_copy(update={"teacher_memory_gb": 2.5e-9 * slot_bytes(facts, RANK)})
        }
    )
    assert num_slots(facts, paged) == 3


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
        trainer.simulate = lambda batch: (trainer._noise(batch.target), trainer.sigmas[:1].expand(len(batch)))
        counted = rows_of(adapter.pipeline.transformer, lambda: trainer.fit(lambda *_: None))
        config = trainer.config
    simulated = 1.5 * config.train.critic_ratio * config.train.batch_size  # what is expected of four steps
    assert sum(counted[False]) + 2 * sum(counted[True]) + simulated == forward_passes(config)
    assert max(counted[True]) == rows_with_gradient(config)
    assert max(counted[False]) == scoring_rows(config)


def test_a_plan_reads_no_weights(job, tmp_path, tiny_folder):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    found = make_plan(job(pipeline=str(bare)))
    assert found["problems"] == []
    assert found["model"]["pipeline"] == "Flux2KleinPipeline"
    assert found["model"]["parameters"] == sum(p.numel() for p in tiny_pipeline().transformer.parameters())
    assert found["model"]["tokens"] == 16 + 16 + MAX_SEQUENCE_LENGTH
    assert found["passes"]["rendering"] == 2 * 4 * 2 * 2  # effects, pictures, steps, with and without the prompt
    parts = found["memory"]
    together = sum(size for name, size in parts.items() if name not in ("encoders", "rendering", "peak", "device"))
    assert parts["peak"] == max(parts["encoders"], parts["rendering"], together)
    assert parts["rendering"] > parts["base"] + parts["teachers"]
    assert not (tmp_path / "out").exists()


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
    planned = make_plan(config)["disk"]["encoded while it trains, in memory too"]
    adapter = tiny_adapter(load_pipeline(str(tiny_folder), "cpu"))
    config = with_guidance(config, adapter)
    shapes = linear_shapes(adapter.pipeline.transformer)
    data = encode_data(config, adapter, {e.name: read_lora(e.lora, shapes) for e in config.effects})
    different = [data.text.embeds, data.targets, data.general_sources, data.general_targets]
    assert planned == sum(4 * t.numel() for t in different)


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

    def entries(cache, kind, keys, make):
        seen[kind] = seen.get(kind, 0) + len(keys)
        return [{"embeds" if kind == "prompts" else "latents": torch.zeros(1, 1)}] * len(keys)

    monkeypatch.setattr("clora.data.cache.Cache.entries", entries)
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


def test_every_problem_is_told_at_once(job, tmp_path):
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    save_diffusers_lora(random_lora(tiny_pipeline().transformer, 2, 0), tmp_path / "good.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a safetensors file")
    effects = [
        {"name": "a", "lora": str(tmp_path / "missing.safetensors"), "prompt": "make it snow"},
        {"name": "b", "lora": str(tmp_path / "broken.safetensors"), "prompt": "snow " * 60, "student_prompts": ["q"]},
        {"name": "c", "lora": str(tmp_path / "good.safetensors"), "prompt": "p", "sources": str(tmp_path / "none")},
    ]
    config = job(effects, student={"rank": 4, "targets": ("to_nothing",)}, data={"general_instructions": "no.txt"})
    problems = make_plan(config)["problems"]
    for text in (
        f"data.sources: {tmp_path / 'images' / 'empty.png'} is empty",
        f"effects.0.lora: {tmp_path / 'missing.safetensors'} does not exist",
        "broken.safetensors is not a readable safetensors file",
        "expected a prompt of at most 40 tokens",
        f"effects.2.sources: {tmp_path / 'none'}: expected a folder of images",
        "no.txt cannot be read",
        "to_nothing",
    ):
        assert sum(text in problem for problem in problems) == 1, (text, problems)
    assert len(problems) == len(set(problems))


def test_pictures_are_told_of_by_the_setting_that_names_them(job, tmp_path):
    (tmp_path / "before").mkdir()
    own = {"sources": str(tmp_path / "before"), "targets": str(tmp_path / "gone")}
    effects = [{"name": "a", "lora": str(tmp_path / "snow.safetensors"), "prompt": "make it snow", **own}]
    assert make_plan(job(effects, data={"sources": str(tmp_path / "nowhere")}))["problems"] == [
        f"data.sources: {tmp_path / 'nowhere'}: expected a folder of images, found nothing",
        f"effects.0.sources: {tmp_path / 'before'} holds no images; put at least one PNG, JPEG or WebP file in it",
        f"effects.0.targets: {tmp_path / 'gone'}: expected a folder of images, found nothing",
    ]


def test_a_pipeline_that_cannot_be_read_is_a_problem_among_the_others(job, tmp_path):
    (tmp_path / "broken").mkdir()
    effects = [{"name": "a", "lora": "a", "prompt": "p", "sources": str(tmp_path / "none")}]
    problems = make_plan(job(effects, pipeline=str(tmp_path / "broken")))["problems"]
    assert any("is no diffusers pipeline" in problem for problem in problems)
    assert any("none: expected a folder of images" in problem for problem in problems)


def test_a_component_of_an_unknown_class_is_a_problem(job, tmp_path, tiny_folder):
    folder = tmp_path / "later"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder"] = ["transformers", "LaterForCausalLM"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (problem,) = make_plan(job(pipeline=str(folder)))["problems"]
    assert "text_encoder cannot be loaded as LaterForCausalLM" in problem


def test_a_processor_without_torchvision_says_what_to_install(job, tmp_path, tiny_folder, monkeypatch):
    def needs_torchvision(folder):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("transformers.Qwen2VLProcessor.from_pretrained", needs_torchvision)
    folder = tmp_path / "qwen"
    shutil.copytree(tiny_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (problem,) = make_plan(job(pipeline=str(folder)))["problems"]
    assert "tokenizer cannot be loaded as Qwen2VLProcessor: it needs torchvision; pip install torchvision" in problem
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("loads weights"))
    with pytest.raises(CloraError) as told:
        load_pipeline(str(folder), "cpu")
    assert str(told.value) == problem


def save_for_plan(pipeline, folder, monkeypatch):
    """Saves a pipeline; its processor, of a class of the tests', stands in for transformers' own, which needs torchvision."""
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    for name in {"processor", "text_processor"} & set(index):
        index[name] = ["transformers", "Qwen2VLProcessor"]
        processor = getattr(pipeline, name)
        monkeypatch.setattr(
            "transformers.Qwen2VLProcessor.from_pretrained", lambda folder, processor=processor: processor
        )
    (folder / "model_index.json").write_text(json.dumps(index))


def pipeline_of(family, monkeypatch):
    if family == "LongCatImageEditPipeline":
        tiny_longcat.shrink(monkeypatch)
        pipeline = tiny_longcat.tiny_pipeline()
        pipeline.tokenizer_max_length = 512  # of every loaded pipeline: it is not saved
        return pipeline
    if family.startswith("QwenImage"):
        is_21 = family == "QwenImage21Pipeline"
        pipeline = tiny_qwen_image.tiny_qwen21_pipeline() if is_21 else tiny_qwen_image.tiny_qwen_pipeline()
        tiny_qwen_image.shrink(monkeypatch, pipeline)
        return pipeline
    makers = {"Flux2Pipeline": tiny_flux.tiny_flux2, "FluxKontextPipeline": tiny_flux.tiny_kontext}
    return makers.get(family, tiny_z_image.tiny_pipeline)()


def size_of(family):
    """Height and width that a family takes."""
    return (64, 96) if family == "QwenImage21Pipeline" else (64, 80)


@pytest.fixture
def job_of(tmp_path, monkeypatch):
    """Returns job_of(family): a config of a saved tiny pipeline, and the pipeline."""

    def make(family):
        if not hasattr(diffusers, family):
            pytest.skip(f"this diffusers has no {family}")
        pipeline = pipeline_of(family, monkeypatch)
        save_for_plan(pipeline, tmp_path / family, monkeypatch)
        save_diffusers_lora(random_lora(pipeline.transformer, 2, 0), tmp_path / "a.safetensors")
        write_images(tmp_path / "images", 1)
        data = {"sources": str(tmp_path / "images"), "size": size_of(family), "max_sequence_length": 48}
        effects = [{"name": "a", "lora": str(tmp_path / "a.safetensors"), "prompt": "p", "student_prompts": ["q"]}]
        data["general_instructions"] = ("snow",)
        return tiny_config(effects, pipeline=str(tmp_path / family), output=str(tmp_path / "o"), data=data), pipeline

    return make


TEMPLATE_TOKENS = {
    "Flux2Pipeline": 0,
    "FluxKontextPipeline": 0,
    "LongCatImageEditPipeline": 2,
    "QwenImage21Pipeline": 21,  # in the tokenizer of these tests
    "QwenImageEditPlusPipeline": 23,
    "ZImageOmniPipeline": 8,
}
"""Tokens that are encoded with a prompt besides it and its picture, which the plan leaves out."""


@pytest.mark.parametrize("family", TEMPLATE_TOKENS)
def test_a_row_has_the_tokens_that_are_encoded(job_of, family):
    """The real pipeline encodes a picture and a prompt; what is left of the longest prompt is added."""
    config, pipeline = job_of(family)
    found = make_plan(config)
    assert found["problems"] == []
    adapter = adapter_for(pipeline, config.data.size, 48)
    pixels = [torch.zeros(1, 3, *config.data.size)]
    text = adapter.encode_prompts(["snow"], pixels)
    tokens = int((text.embeds != 0).any(-1).sum())  # zeros are places of images, or ends of segments
    if family.startswith(("QwenImage", "ZImage")):  # they pad no prompt
        tokens += 48 - adapter.num_tokens("snow")
    counted = adapter.latent_shape[0] + sum(map(prod, adapter.encode_sources(pixels)[1])) + tokens
    assert counted - found["model"]["tokens"] == TEMPLATE_TOKENS[family]
    assert found["memory"]["peak"] > found["memory"]["base"]


@pytest.mark.parametrize("family", TEMPLATE_TOKENS)
def test_a_familys_pass_is_counted_as_it_runs_on_what_is_encoded(job_of, family):
    """Operations, and bytes kept for the gradient, of the real pipeline with a picture and a prompt."""
    config, pipeline = job_of(family)
    adapter, transformer = adapter_for(pipeline, config.data.size, 48), pipeline.transformer
    pixels = [torch.rand(1, 3, *config.data.size)]
    text = adapter.encode_prompts(["snow"], pixels)
    source, shapes = adapter.encode_sources(pixels)
    tokens = adapter.num_tokens("snow") if family == "ZImageOmniPipeline" else text.embeds.shape[1]
    bare = adapter_for(skeleton(config.pipeline, torch.float32), config.data.size, 48)
    cost = pass_cost(bare, linear_names(transformer), RANK, (tokens, text.embeds.shape[2]))
    with AdapterBank(transformer, {"student": random_lora(transformer, RANK, 0)}) as bank:
        counter = FlopCounterMode(display=False)

        def run():
            slots = bank.slots(trainable=True)
            with bank.route(slots, torch.zeros(1, dtype=torch.int64)), counter:
                noise = torch.randn(1, *adapter.latent_shape)
                return adapter.velocity(
                    noise, torch.full((1,), 0.5), Conditioning(text, source, shapes)
                ), slots.parameters()

        assert saved_bytes(transformer, run) == pytest.approx(cost.saved, rel=0.01)
    assert counter.get_total_flops() == cost.flops
    assert source.shape[1] == source_rows(bare)
    assert count_blocks(bare.pipeline.transformer) >= 2


def test_a_family_whose_pass_cannot_be_counted_is_checked_all_the_same(job_of, monkeypatch):
    monkeypatch.setattr("clora.commands.plan.cost._TEXT_CHANNELS", ())
    config, _ = job_of("ZImageOmniPipeline")
    found = make_plan(config)
    assert found["problems"] == []
    assert "cannot run ZImageOmniPipeline without its weights" in found["notes"][0]
    broken = config.model_copy(update={"student": config.student.model_copy(update={"targets": ("to_nothing",)})})
    assert any("to_nothing" in problem for problem in make_plan(broken)["problems"])


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


def test_minutes_bound_the_training_but_not_the_rendering(job):
    """At the rate of this machine, which is measured: one update of this model takes less than a minute anywhere."""
    long = make_plan(job(train={"updates": 10**9, "minutes": 3}))["time"]
    assert long["all"] == pytest.approx(3 * 60 + long["rendering"])
    short = make_plan(job(train={"updates": 2, "minutes": 30}))
    assert short["passes"]["all"] == short["passes"]["rendering"] + 2 * short["passes"]["update"]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(20_430_000_000, "20.43 B"), (3_140_000, "3.1 M"), (999_000_000, "999.0 M"), (60_500, "60.5 K")],
)
def test_parameters_are_told_in_their_unit(count, shown):
    assert _parameters(count) == f"{shown} parameters"


def test_the_memory_of_the_cpu_is_the_machines():
    assert 1e9 < device_memory(torch.device("cpu")) < 1e14
    assert device_memory(torch.device("mps")) is None


def test_too_little_memory_is_told_with_what_helps(job, monkeypatch):
    monkeypatch.setattr("clora.commands.plan.cost.device_memory", lambda device: 1000)
    (problem,) = make_plan(job())["problems"]
    assert "the device has 1.0 kB" in problem
    assert "train.gradient_checkpointing=true" in problem


def test_the_command(job, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(job().model_dump(mode="json")))
    runner = CliRunner()
    result = runner.invoke(app, ["plan", str(file), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["time"]["flops_per_second"] > 1e6
    result = runner.invoke(app, ["plan", str(file), "effects.0.lora=nowhere.safetensors"])
    assert result.exit_code == 1
    assert "1 problem" in result.output
    assert "device memory" in result.output


def test_files_and_layers_are_checked_where_the_size_is_wrong(job, tmp_path):
    """Size, LoRA files, what these change and targets are wrong: none hides another."""
    save_file(
        {"other.lora_A.weight": torch.ones(2, 8), "other.lora_B.weight": torch.ones(8, 2)}, tmp_path / "o.safetensors"
    )
    effects = [
        {"name": name, "lora": str(tmp_path / f"{name}.safetensors"), "prompt": "p", "student_prompts": [name]}
        for name in ("gone", "o")
    ]
    student = {"rank": RANK, "targets": ("to_nothing",)}
    problems = make_plan(job(effects, data={"size": (17, 16)}, student=student))["problems"]
    for text in (
        "expected an image size in multiples of 4",
        f"effects.0.lora: {tmp_path / 'gone.safetensors'} does not exist",
        "o.safetensors: no key fits the model",
        "to_nothing",
    ):
        assert sum(text in problem for problem in problems) == 1, (text, problems)


def test_files_are_checked_where_the_config_is_refused(job, tmp_path):
    file = tmp_path / "my.yaml"
    tree = job().model_dump(mode="json")
    tree["effects"][1] |= {"lora": str(tmp_path / "gone.safetensors"), "sources": 3}
    tree["effects"].append("nothing")
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    file.write_text(json.dumps(tree | {"seed": "x"}))
    result = CliRunner().invoke(app, ["plan", str(file), "train.updates=many"])
    told = str(result.exception)
    for text in (
        f"{file}: seed: expected a whole number",
        "override 'train.updates=many': train.updates: expected",
        f"{file}: effects.1.sources: expected text",
        f"effects.1.lora: {tmp_path / 'gone.safetensors'} does not exist",
        f"data.sources: {tmp_path / 'images' / 'empty.png'} is empty",
    ):
        assert told.count(text) == 1, (text, told)
    file.write_text("effects: [")
    assert "not valid YAML" in str(CliRunner().invoke(app, ["plan", str(file)]).exception)
