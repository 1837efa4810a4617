"""One iteration against plain transformers computed row by row; ablations, resuming, divergence."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from clora.adapter_bank import AdapterBank, RoutedLinear
from clora.data import GENERAL, BatchSampler
from clora.distill import initial_student, train_student
from clora.errors import CloraError
from clora.flow_matching import shift
from clora.lora.merge import sum_svd
from clora.ops import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION
from clora.testing import merge_lora, random_data, random_lora, random_teachers, tiny_config
from clora.trainer import CRITIC, STUDENT, DistillTrainer

TERMS = {"backward_simulation": "dmd_bs", "target_simulation": "dmd_ts", "trajectory_anchoring": "anchor"}


@contextmanager
def make_trainer(adapter, data=None, **sections):
    """A trainer of three random teachers whose student and critic differ and do something from the start."""
    transformer = adapter.pipeline.transformer
    teachers = random_teachers(transformer, 3)
    states = {STUDENT: random_lora(transformer, 4, 101), CRITIC: random_lora(transformer, 4, 102), **teachers}
    config = tiny_config(list(teachers), **sections)
    bank = AdapterBank(transformer, states)
    try:
        yield DistillTrainer(config, adapter, bank, data or random_data(adapter, list(teachers)))
    finally:
        bank.detach()


def mixed_batch(trainer):
    """A batch with rows of several effects and of the general stream, the same for every objective."""
    general = torch.arange(trainer.config.train.batch_size) % 3 == 1
    batch = trainer.sampler._gather(general)
    assert len(batch.effect.unique()) > 2, "draw another seed"
    return batch


def plain_velocity(adapter, transformer, x, sigma, conditioning):
    stand_in = copy.copy(adapter)
    stand_in.pipeline = SimpleNamespace(transformer=transformer)
    with torch.no_grad():
        return stand_in.velocity(x, sigma, conditioning)


def same(state, other):
    return all(
        torch.equal(state.modules[m].lora_A, other.modules[m].lora_A)
        and torch.equal(state.modules[m].lora_B, other.modules[m].lora_B)
        for m in state.modules
    )


def changed(trainer, before):
    return {name for name, state in before.items() if not same(trainer.bank.state(name), state)}


def slots(trainer):
    return {name: trainer.bank.state(name) for name in trainer.bank.names}


def test_two_updates_with_every_part(adapter):
    weights = {name: p.clone() for name, p in adapter.pipeline.transformer.named_parameters()}
    reports = []
    with make_trainer(adapter) as trainer:
        before = slots(trainer)
        trainer.fit(lambda update, values: reports.append((update, dict(values))))
        assert changed(trainer, before) == {STUDENT, CRITIC}
    assert [update for update, _ in reports] == [1, 2]
    for _, values in reports:
        assert set(values) == {"dmd_bs", "dmd_ts", "anchor", "loss", "critic"}
        assert values["loss"] == pytest.approx(values["dmd_bs"] + values["dmd_ts"] + values["anchor"], rel=1e-5)
        assert values["dmd_bs"] > 0
        assert values["critic"] > 0
    for name, p in adapter.pipeline.transformer.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_each_step_trains_its_own_slot(adapter):
    with make_trainer(adapter) as trainer:
        batch, before = mixed_batch(trainer), slots(trainer)
        trainer.critic_step(batch)
        assert changed(trainer, before) == {CRITIC}
        before = slots(trainer)
        trainer.student_step(batch)
        assert changed(trainer, before) == {STUDENT}


@pytest.mark.parametrize("part", TERMS)
def test_a_part_switched_off_removes_its_term_alone(adapter, part):
    for objective in ({part: False}, {"weights": {part: 0.0}}):
        with make_trainer(adapter, objective=objective) as trainer:
            values = trainer.student_step(mixed_batch(trainer))
        for other, term in TERMS.items():
            assert (values[term] == 0) == (other == part), (objective, values)


def test_weights_scale_their_terms(adapter):
    values = []
    for weight in (1.0, 3.0):
        with make_trainer(adapter, objective={"weights": dict.fromkeys(TERMS, weight)}) as trainer:
            values.append(trainer.student_step(mixed_batch(trainer)))
    assert values[1] == pytest.approx({name: 3 * value for name, value in values[0].items()}, rel=1e-4)


@pytest.mark.parametrize("scoring_rows", [None, 5])
def test_the_scoring_pass_equals_separate_plain_passes(adapter, scoring_rows):
    """Critic, teacher and unconditional teacher of every row, each by its own merged copy of the transformer."""
    base = copy.deepcopy(adapter.pipeline.transformer)
    with make_trainer(adapter, train={"scoring_rows": scoring_rows}) as trainer:
        batch = mixed_batch(trainer)
        rows = trainer._student_rows(batch, anchor_only=False)
        velocity, state = torch.randn(rows.x.shape), trainer.generator.get_state()
        sizes = []
        hook = adapter.pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        scores = trainer._score(rows, velocity)
        hook.remove()
        models = {name: merge_lora(base, trainer.bank.state(name)) for name in trainer.bank.names}

    n = len(rows.teacher)
    assert n == len(batch) + len(batch.effect_rows())
    assert sizes == ([3 * n] if scoring_rows is None else [5] * (3 * n // 5) + [3 * n % 5] * (3 * n % 5 > 0))
    noise = torch.randn(scores.renoised.shape, generator=torch.Generator().set_state(state))
    sigma = scores.sigma.view(-1, 1, 1)
    x_g = rows.x[:n] - rows.sigma[:n].view(-1, 1, 1) * velocity[:n]
    torch.testing.assert_close(scores.renoised, (1 - sigma) * x_g + sigma * noise)
    empty = trainer.data.empty_text[None]
    for i, effect in enumerate(rows.effect[:n].tolist()):
        x, s = scores.renoised[[i]], scores.sigma[[i]]
        teacher = base if effect == GENERAL else models[trainer.data.effects[effect]]
        cond, student = rows.teacher[[i]], rows.conditioning[[i]]
        expected = {
            "critic": plain_velocity(adapter, models[CRITIC], x, s, student),
            "teacher": plain_velocity(adapter, teacher, x, s, cond),
            "teacher_uncond": plain_velocity(adapter, teacher, x, s, cond.with_text(empty)),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(scores, name)[[i]], value, rtol=1e-4, atol=1e-5, msg=f"{name}, row {i}")


def test_rows_of_backward_simulation_lie_on_the_students_trajectory(adapter):
    base = copy.deepcopy(adapter.pipeline.transformer)
    with make_trainer(adapter) as trainer:
        batch, state = mixed_batch(trainer), trainer.generator.get_state()
        x, sigma = trainer._backward_simulation(batch)
        student, sigmas = merge_lora(base, trainer.bank.state(STUDENT)), trainer.sigmas
    generator = torch.Generator().set_state(state)
    steps = torch.randint(len(sigmas), (len(batch),), generator=generator)
    assert torch.equal(sigma, sigmas[steps])
    path = [torch.randn(x.shape, generator=generator)]
    for k in range(int(steps.max())):
        noise = torch.randn(x.shape, generator=generator)
        x0 = path[-1] - sigmas[k] * plain_velocity(adapter, student, path[-1], sigmas[k].expand(len(x)), batch.student)
        path.append((1 - sigmas[k + 1]) * x0 + sigmas[k + 1] * noise)
    for i, step in enumerate(steps.tolist()):
        torch.testing.assert_close(x[i], path[step][i], rtol=1e-4, atol=1e-5)


def test_the_critic_learns_student_samples_under_the_students_prompts(adapter, monkeypatch):
    with make_trainer(adapter) as trainer:
        batch, calls, velocity = mixed_batch(trainer), [], trainer._velocity

        def record(slots, ids, x, sigma, conditioning):
            calls.append(
                (slots.names, x.detach(), sigma, conditioning.text, out := velocity(slots, ids, x, sigma, conditioning))
            )
            return out

        monkeypatch.setattr(trainer, "_velocity", record)
        values = trainer.critic_step(batch)
    assert {names for names, *_ in calls[:-1]} == {(STUDENT,)}
    _, x_student, sigma_student, _, v_student = calls[-2]
    names, x, sigma, text, v = calls[-1]
    assert names == (CRITIC,)
    assert torch.equal(text, batch.student.text)
    x0 = x_student - sigma_student.view(-1, 1, 1) * v_student
    s = sigma.view(-1, 1, 1)
    noise = (x - (1 - s) * x0) / s
    assert values["critic"] == pytest.approx(float((v.detach() - (noise - x0)).square().mean()), rel=1e-3)
    assert not v_student.requires_grad


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_noise_levels_of_the_students_rows(adapter, rule):
    tau_max, tau_min = {"paper": (0.75, 0.5), "released": (0.834, 0.75)}[rule]
    anchor_noise = {"paper": "unrestricted", "released": "released"}[rule]
    objective = {"tau_rule": rule, "anchor_noise": anchor_noise}
    with make_trainer(adapter, objective=objective, train={"batch_size": 64}, sampler={"steps": 8}) as trainer:
        batch = trainer.sampler.draw(0)
        rows = trainer._student_rows(batch, anchor_only=False)
    effects = batch.effect_rows()
    kind = torch.cat(
        [
            torch.full((64,), BACKWARD_SIMULATION),
            torch.full((len(effects),), TARGET_SIMULATION),
            torch.full((len(effects),), ANCHOR),
        ]
    )
    assert torch.equal(rows.kind, kind)
    assert torch.equal(rows.effect, torch.cat([batch.effect, effects.effect, effects.effect]))
    bs, ts, anchor = (kind == k for k in (BACKWARD_SIMULATION, TARGET_SIMULATION, ANCHOR))
    schedule = trainer.sigmas.tolist()
    assert set(rows.sigma[bs].tolist()) <= set(schedule)
    assert set(rows.sigma[ts].tolist()) == {s for s in schedule if s < tau_max}
    scored = rows.score_sigma
    assert (scored[ts[kind != ANCHOR]] > tau_min).all()
    assert (scored[:64] < tau_min).any()
    target, sigma = effects.target, rows.sigma[anchor].view(-1, 1, 1)
    torch.testing.assert_close(rows.x[anchor] - sigma * rows.anchor_target, target, rtol=0, atol=1e-5)
    noise = (rows.x[ts] - (1 - rows.sigma[ts].view(-1, 1, 1)) * target) / rows.sigma[ts].view(-1, 1, 1)
    assert abs(float(noise.std()) - 1) < 0.05
    floor = shift(scored[:64][batch.effect >= 0], 3.0)
    assert bool((rows.sigma[anchor] >= floor - 1e-6).all()) == (rule == "released")


def test_released_anchor_noise_without_backward_simulation(adapter):
    with make_trainer(adapter, objective={"anchor_noise": "released", "backward_simulation": False}) as trainer:
        assert trainer.student_step(mixed_batch(trainer))["anchor"] > 0


def test_integer_timesteps(adapter):
    with make_trainer(adapter, sampler={"integer_timesteps": True, "steps": 8}, train={"updates": 1}) as trainer:
        expected = [1000, 954, 900, 833, 750, 642, 500, 300]
        assert (trainer.sigmas * 1000).round().int().tolist() == expected
        torch.testing.assert_close(trainer.sigmas * 1000, torch.tensor(expected).float())
        trainer.fit(lambda update, values: None)


def test_norm_rescale_keeps_the_norm_of_the_conditional_velocity(adapter):
    scores = []
    for rescale in (False, True):
        with make_trainer(adapter, objective={"norm_rescale": rescale}, sampler={"guidance": 4.0}) as trainer:
            rows = trainer._student_rows(mixed_batch(trainer), anchor_only=False)
            scores.append(trainer._score(rows, torch.zeros_like(rows.x)))
    plain, rescaled = scores
    guided = plain.teacher + 4 * (plain.teacher - plain.teacher_uncond)
    expected = guided * plain.teacher.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rescaled.teacher, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(rescaled.teacher, rescaled.teacher_uncond)  # so that guidance adds nothing more
    assert torch.equal(rescaled.critic, plain.critic)


def test_resuming_equals_an_uninterrupted_run_bitwise(adapter, tmp_path):
    """Interrupted between two draws of the streams, so that these must be kept too."""
    sections = {"train": {"updates": 3, "checkpoint_every": 1}, "objective": {"switch_every": 4}}
    checkpoint = tmp_path / "state.safetensors"
    whole, resumed = {}, {}

    def stop(update, values):
        if update == 2:
            raise KeyboardInterrupt

    with make_trainer(adapter, **sections) as trainer:
        trainer.fit(lambda update, values: whole.update({update: dict(values)}))
        expected, moments = slots(trainer), trainer.student_optimizer.state_dict()["state"]
    with make_trainer(adapter, **sections) as trainer, pytest.raises(KeyboardInterrupt):
        trainer.fit(stop, checkpoint)
    with make_trainer(adapter, seed=99, **sections) as trainer:
        trainer.fit(lambda update, values: resumed.update({update: dict(values)}), checkpoint)
        assert not changed(trainer, expected)
        for i, state in trainer.student_optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, moments[i][key]) for key, value in state.items())
    assert resumed == {2: whole[2], 3: whole[3]}
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize(("objective", "term"), [({}, "dmd_ts"), ({"target_simulation": False}, "anchor")])
def test_a_nan_target_stops_naming_update_effect_and_term(adapter, objective, term):
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    data.targets[1] = torch.nan
    objective = {"dual_stream": False, **objective}
    with make_trainer(adapter, data, objective=objective, train={"batch_size": 16}) as trainer:
        before = trainer.bank.state(STUDENT)
        with pytest.raises(CloraError, match=f"update 1: the student.*effect 'effect_1', term {term}"):
            trainer.fit(lambda update, values: None)
        assert same(trainer.bank.state(STUDENT), before)


def test_a_nan_source_stops_the_critic(adapter):
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    data.general_sources[:] = torch.nan
    with make_trainer(adapter, data) as trainer:
        before = trainer.bank.state(CRITIC)
        with pytest.raises(CloraError, match="update 1: the critic.*effect 'general stream', term critic"):
            trainer.critic_step(mixed_batch(trainer))
        assert same(trainer.bank.state(CRITIC), before)


def test_an_infinite_gradient_stops(adapter):
    with make_trainer(adapter) as trainer:
        before = trainer.bank.state(STUDENT)
        loss = sum(p.sum() for p in trainer.student.parameters()) * torch.inf
        with pytest.raises(CloraError, match="update 1: the student's gradient is not finite"):
            trainer._step(trainer.student_optimizer, trainer.student, loss, "student")
        assert same(trainer.bank.state(STUDENT), before)


def test_gradients_are_clipped(adapter):
    with make_trainer(adapter, train={"clip": 0.5}) as trainer:
        loss = 100 * sum(p.sum() for p in trainer.student.parameters())
        trainer._step(trainer.student_optimizer, trainer.student, loss, "student")
        norm = torch.stack([p.grad.norm() for p in trainer.student.parameters()]).norm()
    assert float(norm) == pytest.approx(0.5, rel=1e-3)


def test_anchor_updates_come_first_and_learn_the_targets(adapter):
    losses, data = [], random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    data.targets[:] = 3 * data.targets[0, 0, 0]  # one colour: soon learned
    train = {"updates": 25, "anchor_updates": 25, "learning_rate": 3e-2}
    with make_trainer(adapter, data, train=train) as trainer:
        before = trainer.bank.state(CRITIC)
        trainer.fit(lambda update, values: losses.append(values))
        assert same(trainer.bank.state(CRITIC), before)
    assert all(values["dmd_bs"] == values["dmd_ts"] == 0 and "critic" not in values for values in losses)
    first, last = (sum(values["anchor"] for values in part) / 5 for part in (losses[:5], losses[-5:]))
    assert last < 0.8 * first


def test_the_critic_starts_from_the_anchored_student(adapter, monkeypatch):
    train = {"updates": 4, "anchor_updates": 3, "learning_rate": 3e-2}
    with make_trainer(adapter, train=train) as trainer:
        equal = []

        def compare(batch):
            pairs = zip(trainer.critic.parameters(), trainer.student.parameters(), strict=True)
            equal.append(all(torch.equal(critic, student) for critic, student in pairs))
            return {}

        monkeypatch.setattr(trainer, "critic_step", compare)
        trainer.fit(lambda update, values: None)
    assert equal
    assert equal[0]


def test_the_learning_rate_falls_to_a_tenth(adapter):
    with make_trainer(adapter, train={"updates": 10, "learning_rate": 1.0, "critic_learning_rate": 2.0}) as trainer:
        rates = []
        for trainer.update in range(10):
            trainer._set_learning_rate(float("inf"))
            rates.append(trainer.student_optimizer.param_groups[0]["lr"])
            assert trainer.critic_optimizer.param_groups[0]["lr"] == pytest.approx(2 * rates[-1])
    assert rates[:8] == [1.0] * 8
    assert 1 > rates[8] > rates[9] > 0.1


def test_a_time_limit_ends_the_run(adapter):
    with make_trainer(adapter, train={"updates": 10**6, "minutes": 0.001}) as trainer:
        trainer.fit(lambda update, values: None)
        assert trainer.update < 1000


def sampler(adapter, batch_size=6, **objective):
    effects = ["effect_0", "effect_1", "effect_2"]
    config = tiny_config(effects, objective=objective)
    data = random_data(adapter, effects)
    return BatchSampler(data, config.objective, batch_size, torch.Generator().manual_seed(0)), data


def test_streams_have_their_share_and_are_redrawn_in_time(adapter):
    draws, _ = sampler(adapter, 4000, switch_probability=0.3)
    general = draws.draw(0).effect == GENERAL
    assert abs(float(general.float().mean()) - 0.7) < 0.03
    draws, _ = sampler(adapter, 64, switch_every=3)
    streams = [draws.draw(update).effect == GENERAL for update in range(4)]
    assert torch.equal(streams[0], streams[1])
    assert torch.equal(streams[0], streams[2])
    assert not torch.equal(streams[0], streams[3])
    for off in ("dual_stream", "backward_simulation"):  # the latter is the general stream's only loss
        draws, _ = sampler(adapter, 64, **{off: False})
        assert (draws.draw(0).effect >= 0).all()
    draws, _ = sampler(adapter, 64)
    assert (draws.draw_effects().effect >= 0).all()


@pytest.mark.parametrize("orthogonal", [True, False])
def test_a_batch_holds_matching_rows(adapter, orthogonal):
    draws, data = sampler(adapter, 200, orthogonal_prompting=orthogonal)
    batch = draws.draw(0)
    assert torch.equal(batch.student.source, batch.teacher.source)
    phrasings = set()
    for i, e in enumerate(batch.effect.tolist()):
        source, target, student, teacher = (
            batch.student.source[i],
            batch.target[i],
            batch.student.text[i],
            batch.teacher.text[i],
        )
        if e == GENERAL:
            assert any(torch.equal(source, s) for s in data.general_sources)
            assert any(torch.equal(student, t) for t in data.general_text)
            assert torch.equal(student, teacher)
            assert not target.any()
            continue
        pairs = zip(data.sources[e], data.targets[e], strict=True)
        assert any(torch.equal(source, s) and torch.equal(target, t) for s, t in pairs)
        assert torch.equal(teacher, data.teacher_text[e])
        if orthogonal:
            phrasings.add((e, next(p for p, t in enumerate(data.student_text[e]) if torch.equal(student, t))))
        else:
            assert torch.equal(student, teacher)
    assert phrasings == ({(e, p) for e in range(3) for p in range(2)} if orthogonal else set())


@pytest.mark.parametrize("init", ["zero", "merge"])
def test_one_effect_is_distilled_too(adapter, init):
    transformer = adapter.pipeline.transformer
    teachers = {"only": random_lora(transformer, 2, 0, ["transformer_blocks.0.attn.to_q"])}
    config = tiny_config(["only"], student={"init": init})
    before = initial_student(config, transformer, list(teachers.values()))
    reports = []
    state = train_student(config, adapter, teachers, random_data(adapter, ["only"]), lambda u, v: reports.append(v))
    assert len(reports) == 2
    assert state.is_finite()
    assert {m.rank for m in state.modules.values()} == {4}
    assert not same(state, before)
    assert not any(isinstance(module, RoutedLinear) for module in transformer.modules())


@pytest.mark.parametrize("padding", [0, 4])
def test_the_student_starts_at_zero_or_at_the_mean_of_the_teachers(adapter, padding):
    transformer = adapter.pipeline.transformer
    teachers = [state.padded(state.max_rank + padding) for state in random_teachers(transformer, 2).values()]
    zero = initial_student(tiny_config(["a", "b"]), transformer, teachers)
    assert all(not module.delta().any() and module.lora_A.any() for module in zero.modules.values())
    merge = initial_student(tiny_config(["a", "b"], student={"init": "merge", "rank": 6}), transformer, teachers)
    mean = sum_svd(teachers, 6, [0.5, 0.5])
    for name, module in merge.modules.items():
        expected = sum(t.modules[name].delta() for t in teachers if name in t.modules) / 2
        torch.testing.assert_close(module.delta(), expected, rtol=1e-4, atol=1e-5)  # rank 2 + 3 fits in 6
        torch.testing.assert_close(module.delta(), mean.modules[name].delta(), rtol=1e-4, atol=1e-5)
        assert (module.lora_A.abs().sum(1) > 0).all(), "a rank with lora_A = lora_B = 0 never learns"


def test_targets_of_the_student(adapter):
    transformer = adapter.pipeline.transformer
    teachers = random_teachers(transformer, 1)
    config = tiny_config(["effect_0"], student={"targets": ("attn.to_q", "attn.to_k")})
    state = train_student(config, adapter, teachers, random_data(adapter, ["effect_0"]), lambda u, v: None)
    assert set(state.modules) == {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"}
    wrong = tiny_config(["effect_0"], student={"targets": ("attn.to_x",)})
    with pytest.raises(CloraError, match=r"student\.targets.*attn\.to_x"):
        initial_student(wrong, transformer, list(teachers.values()))


def test_a_failed_run_leaves_the_transformer_as_it_was(adapter):
    teachers = random_teachers(adapter.pipeline.transformer, 1)
    data = random_data(adapter, ["effect_0"])
    data = dataclasses.replace(data, targets=data.targets * torch.nan)
    with pytest.raises(CloraError):
        train_student(tiny_config(["effect_0"]), adapter, teachers, data, lambda u, v: None)
    assert not any(isinstance(module, RoutedLinear) for module in adapter.pipeline.transformer.modules())
