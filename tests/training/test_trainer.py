"""One iteration against plain transformers computed row by row; ablations."""

from __future__ import annotations

import copy
import dataclasses
from contextlib import nullcontext

import pytest
import torch
from helpers.trainers import changed, make_trainer, mixed_batch, plain_velocity, rolled, slots

from clora.bank.recompute import recomputed_blocks
from clora.data.batches import GENERAL
from clora.flow.matching import time_shift
from clora.ops import ANCHOR, BACKWARD_SIMULATION, TARGET_SIMULATION
from clora.testing import merge_lora, random_data
from clora.training.faults import LOSSES, raise_first
from clora.training.steps import CRITIC, STUDENT

TERMS = {"backward_simulation": "dmd_bs", "target_simulation": "dmd_ts", "trajectory_anchoring": "anchor"}


def test_two_updates_with_every_part(adapter):
    weights = {name: p.clone() for name, p in adapter.pipeline.transformer.named_parameters()}
    reports = []
    with make_trainer(adapter) as trainer:
        before = slots(trainer)
        trainer.fit(lambda update, values: reports.append((update, dict(values))))
        assert changed(trainer, before) == {STUDENT, CRITIC}
    assert [update for update, _ in reports] == [1, 2]
    for _, values in reports:
        parts = ("gradient", "change", "rate")
        assert set(values) == {*LOSSES, *(f"{name}_{part}" for name in (STUDENT, CRITIC) for part in parts)}
        assert values["loss"] == pytest.approx(values["dmd_bs"] + values["dmd_ts"] + values["anchor"], rel=1e-5)
        assert values["dmd_bs"] > 0
        assert values["critic"] > 0
    for name, p in adapter.pipeline.transformer.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_each_step_trains_its_own_slot(adapter):
    with make_trainer(adapter) as trainer:
        batch, before = mixed_batch(trainer), slots(trainer)
        trainer.steps.critic_step(batch, trainer.steps.simulate(batch))
        assert changed(trainer, before) == {CRITIC}
        before = slots(trainer)
        trainer.steps.student_step(batch, trainer.steps.simulate(batch))
        assert changed(trainer, before) == {STUDENT}


@pytest.mark.parametrize("part", TERMS)
def test_a_part_switched_off_removes_only_its_term(adapter, part):
    for objective in ({part: False}, {"weights": {part: 0.0}}):
        with make_trainer(adapter, objective=objective) as trainer:
            values = raise_first([trainer.steps.student_step(*rolled(trainer))])
        for other, term in TERMS.items():
            assert (values[term] == 0) == (other == part), (objective, values)


def test_weights_scale_their_terms(adapter):
    values = []
    for weight in (1.0, 3.0):
        with make_trainer(adapter, objective={"weights": dict.fromkeys(TERMS, weight)}) as trainer:
            found = raise_first([trainer.steps.student_step(*rolled(trainer))])
            values.append({name: found[name] for name in LOSSES if name in found})
    assert values[1] == pytest.approx({name: 3 * value for name, value in values[0].items()}, rel=1e-4)


@pytest.mark.parametrize("forward_rows", [None, 5])
def test_the_scoring_pass_equals_separate_plain_passes(adapter, forward_rows):
    """Critic, teacher and unconditional teacher of every row, each by its own merged copy of the transformer."""
    base = copy.deepcopy(adapter.pipeline.transformer)
    with make_trainer(adapter, train={"forward_rows": forward_rows}) as trainer:
        batch = mixed_batch(trainer)
        rows = trainer.steps._student_rows(batch, trainer.steps.simulate(batch))
        velocity, sizes = torch.randn(rows.x.shape), []
        hook = adapter.pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        scores = trainer.steps._score(rows, velocity)
        hook.remove()
        models = {name: merge_lora(base, state) for name, state in slots(trainer).items()}

    n = len(rows.teacher)
    assert n == len(batch) + len(batch[batch.effect >= 0])
    assert sizes == ([3 * n] if forward_rows is None else [5] * (3 * n // 5) + [3 * n % 5] * (3 * n % 5 > 0))
    sigma = scores.sigma.view(-1, 1, 1)
    x_g = rows.x[:n] - rows.sigma[:n].view(-1, 1, 1) * velocity[:n]
    torch.testing.assert_close(scores.renoised, (1 - sigma) * x_g + sigma * rows.score_noise)
    for i, effect in enumerate(rows.effect[:n].tolist()):
        x, s = scores.renoised[[i]], scores.sigma[[i]]
        teacher = base if effect == GENERAL else models[trainer.data.effects[effect]]
        cond, student = rows.teacher[[i]], rows.conditioning[[i]]
        empty = trainer.data.text[trainer.data.empty_text[:1, 0]]
        expected = {
            "critic": plain_velocity(adapter, models[CRITIC], x, s, student),
            "teacher": plain_velocity(adapter, teacher, x, s, cond),
            "teacher_uncond": plain_velocity(adapter, teacher, x, s, dataclasses.replace(cond, text=empty)),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(scores, name)[[i]], value, rtol=1e-4, atol=1e-5, msg=f"{name}, row {i}")


@pytest.mark.parametrize("general_targets", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 7])
def test_an_update_in_several_passes_has_the_same_gradients(adapter, limit, general_targets):
    """Parts with rows of one kind, of two and of three, and an update whose kinds have different numbers of rows."""
    found, weights = [], {"backward_simulation": 0.7, "target_simulation": 1.3, "trajectory_anchoring": 2.0}
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    if general_targets:
        data = dataclasses.replace(data, general_targets=torch.randn(len(data.general_pairs), *adapter.latent_shape))
    for rows in (None, limit):
        train = {"gradient_rows": rows, "batch_size": 6}
        with make_trainer(adapter, data, train=train, objective={"weights": weights}) as trainer:
            gradients, sizes = [], []

            def keep(optimizer, slots, gradients=gradients, step=trainer.steps._step):
                gradients.extend(p.grad.clone() for p in slots.parameters())
                return step(optimizer, slots)

            def count(module, args, kwargs, sizes=sizes):
                sizes.extend([len(kwargs["hidden_states"])] * torch.is_grad_enabled())

            trainer.steps._step = keep
            batch, rollout = rolled(trainer)
            hook = adapter.pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
            checks = [trainer.steps.student_step(batch, rollout), trainer.steps.critic_step(batch, rollout)]
            hook.remove()
            found.append((raise_first(checks), gradients))
    num_anchors = len(batch if general_targets else batch[batch.effect >= 0])
    num_rows = len(batch) + len(batch[batch.effect >= 0]) + num_anchors
    assert len(sizes) == -(-num_rows // limit) + -(-len(batch) // limit)
    assert max(sizes) == min(limit, num_rows)
    (values, whole), (parts, added) = found
    assert parts == pytest.approx(values, rel=1e-5)
    for expected, gradient in zip(whole, added, strict=True):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("limit", "shared"), [(None, True), (12, True), (11, False)])
def test_one_pass_of_the_student_serves_both_steps_where_it_fits(adapter, limit, shared, checkpointing):
    """Losses and gradients are those of two passes; the rows whose graphs are held at once stay within the bound."""
    found = []
    for ways in ("two passes", "as it is"):
        train = {"gradient_rows": limit, "batch_size": 6}
        with make_trainer(adapter, train=train, objective={"dual_stream": False}) as trainer:
            sizes, gradients = [], []

            def keep(optimizer, slots, gradients=gradients, step=trainer.steps._step):
                gradients.extend(p.grad.clone() for p in slots.parameters())
                return step(optimizer, slots)

            def count(module, args, kwargs, sizes=sizes):
                sizes.append((len(kwargs["hidden_states"]), torch.is_grad_enabled()))

            trainer.steps._step = keep
            batch, rollout = rolled(trainer)
            hook = adapter.pipeline.transformer.register_forward_pre_hook(count, with_kwargs=True)
            with recomputed_blocks(trainer.bank) if checkpointing else nullcontext():
                predicted = None if ways == "two passes" else trainer.steps.predict(batch, rollout)
                critic = trainer.steps.critic_step(batch, rollout, predicted)
                checks = [critic, trainer.steps.student_step(batch, rollout, predicted)]
            hook.remove()
            found.append((raise_first(checks), gradients, sizes))
    (values, expected, two), (shared_values, added, one) = found
    assert shared_values == pytest.approx(values, rel=1e-5)
    for whole, gradient in zip(expected, added, strict=True):
        assert (gradient - whole).norm() <= 1e-5 * whole.norm()
    num_rows = [sum(size for size, _ in sizes) for sizes in (two, one)]
    assert num_rows[0] - num_rows[1] == 6 * shared
    if shared:
        assert one[:2] == [(6, True), (6, True)], "the prediction, then the critic's pass"


def test_the_rows_of_a_lora_are_scored_side_by_side(adapter):
    with make_trainer(adapter) as trainer:
        rows, routed = trainer.steps._student_rows(*rolled(trainer)), []
        real = trainer.steps._velocity
        trainer.steps._velocity = lambda slots, ids, *rest: routed.append(ids) or real(slots, ids, *rest)
        trainer.steps._score(rows, torch.zeros_like(rows.x))
    (ids,) = routed
    assert torch.equal(ids, ids.sort().values)
    assert len(ids.unique()) > 3, "draw another seed"


def expected_loss(trainer, rows, velocity, scores, weighting, num_samples):
    """The student's loss by its definition, row by row: a tensor with its gradient, and its value."""
    weights = trainer.config.objective.weights
    by_kind = {
        BACKWARD_SIMULATION: weights.backward_simulation,
        TARGET_SIMULATION: weights.target_simulation,
        ANCHOR: weights.trajectory_anchoring,
    }
    loss = value = 0.0
    for i, kind in enumerate(rows.kind.tolist()):
        if kind == ANCHOR:
            row = (velocity[i] - rows.anchor_target[i - len(rows.teacher)]).square().mean()
            row_value = row.detach()
        else:
            x_g = rows.x[i] - rows.sigma[i] * velocity[i]
            x0 = {name: scores.renoised[i] - scores.sigma[i] * getattr(scores, name)[i] for name in scores._fields[2:]}
            real = x0["teacher"] + trainer.config.sampler.guidance * (x0["teacher"] - x0["teacher_uncond"])
            g = (x0["critic"] - real) / (x_g.detach() - real).abs().mean()
            row, row_value = (g * x_g).mean(), 0.5 * g.square().mean()
        divisor = num_samples if weighting == "per_sample" else int((rows.kind == kind).sum())
        loss = loss + by_kind[kind] * row / divisor
        value = value + by_kind[kind] * row_value / divisor
    return loss, float(value)


@pytest.mark.parametrize("gradient_rows", [None, 4])
@pytest.mark.parametrize("weighting", ["per_term", "per_sample"])
def test_what_the_terms_are_divided_by(adapter, weighting, gradient_rows):
    weights = {"backward_simulation": 0.7, "target_simulation": 1.3, "trajectory_anchoring": 2.0}
    objective, train = {"weighting": weighting, "weights": weights}, {"gradient_rows": gradient_rows, "clip": 1e9}
    with make_trainer(adapter, objective=objective, train=train) as trainer:
        steps, found = trainer.steps, []
        batch, rollout = rolled(trainer)
        state = trainer.generator.get_state()
        rows = steps._student_rows(batch, rollout)
        velocity = steps._velocity(trainer.student, 0, rows.x, rows.sigma, rows.conditioning)
        scores = steps._score(rows, velocity.detach())
        loss, value = expected_loss(trainer, rows, velocity, scores, weighting, len(batch))
        expected = torch.autograd.grad(loss, list(trainer.student.parameters()))
        trainer.generator.set_state(state)  # the step draws the same rows
        step = steps._step
        steps._step = lambda *args: found.extend(p.grad.clone() for p in args[1].parameters()) or step(*args)
        values = raise_first([steps.student_step(batch, rollout)])
    assert values["loss"] == pytest.approx(value, rel=1e-4)
    for gradient, exact in zip(found, expected, strict=True):
        assert (gradient - exact).norm() <= 1e-4 * exact.norm() + 1e-7


def test_without_guidance_no_empty_prompt_is_scored(adapter):
    with make_trainer(adapter, sampler={"guidance": 0.0}) as trainer:
        rows, sizes = trainer.steps._student_rows(*rolled(trainer)), []
        hook = adapter.pipeline.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        scores = trainer.steps._score(rows, torch.zeros_like(rows.x))
        hook.remove()
    assert sizes == [2 * len(rows.teacher)]
    assert torch.equal(scores.teacher, scores.teacher_uncond)
    assert not torch.equal(scores.teacher, scores.critic)


def test_rows_of_backward_simulation_lie_on_the_students_trajectory(adapter):
    base = copy.deepcopy(adapter.pipeline.transformer)
    with make_trainer(adapter) as trainer:
        batch, state = mixed_batch(trainer), trainer.generator.get_state()
        x, sigma = trainer.steps.simulate(batch)
        student, sigmas = merge_lora(base, trainer.student.state(STUDENT)), trainer.steps.sigmas
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
        batch, calls, velocity = mixed_batch(trainer), [], trainer.steps._velocity

        def record(slots, ids, x, sigma, conditioning):
            calls.append(
                (slots.names, x.detach(), sigma, conditioning.text, out := velocity(slots, ids, x, sigma, conditioning))
            )
            return out

        monkeypatch.setattr(trainer.steps, "_velocity", record)
        values = raise_first([trainer.steps.critic_step(batch, trainer.steps.simulate(batch))])
    assert {names for names, *_ in calls[:-1]} == {(STUDENT,)}
    _, x_student, sigma_student, _, v_student = calls[-2]
    names, x, sigma, text, v = calls[-1]
    assert names == (CRITIC,)
    assert torch.equal(text.embeds, batch.student.text.embeds)
    x0 = x_student - sigma_student.view(-1, 1, 1) * v_student
    s = sigma.view(-1, 1, 1)
    noise = (x - (1 - s) * x0) / s
    assert values["critic"] == pytest.approx(float((v.detach() - (noise - x0)).square().mean()), rel=1e-3)
    assert not v_student.requires_grad


@pytest.mark.parametrize(
    ("steps", "shift", "starts", "lowest_score"),
    [
        (8, 3.0, [0.8333333, 0.75, 0.6428571, 0.5, 0.3], 0.75),
        (8, 1.0, [0.625, 0.5, 0.375, 0.25, 0.125], 0.5),
        (2, 3.0, [0.75], 0.75),
    ],
)
@pytest.mark.parametrize("anchor_noise", ["unrestricted", "released"])
def test_noise_levels_of_the_students_rows(adapter, steps, shift, starts, lowest_score, anchor_noise):
    objective, sampler = {"anchor_noise": anchor_noise}, {"steps": steps, "shift": shift}
    with make_trainer(adapter, objective=objective, train={"batch_size": 64}, sampler=sampler) as trainer:
        batch = trainer.sampler.draw(0)
        rows = trainer.steps._student_rows(batch, trainer.steps.simulate(batch))
    effects = batch[batch.effect >= 0]
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
    schedule = trainer.steps.sigmas.tolist()
    assert set(rows.sigma[bs].tolist()) <= set(schedule)
    assert sorted(set(rows.sigma[ts].tolist()), reverse=True) == pytest.approx(starts)
    scored = rows.score_sigma
    assert (scored[ts[kind != ANCHOR]] > lowest_score).all()
    assert (scored[:64] < lowest_score).any()
    target, sigma = effects.target, rows.sigma[anchor].view(-1, 1, 1)
    torch.testing.assert_close(rows.x[anchor] - sigma * rows.anchor_target, target, rtol=0, atol=1e-5)
    noise = (rows.x[ts] - (1 - rows.sigma[ts].view(-1, 1, 1)) * target) / rows.sigma[ts].view(-1, 1, 1)
    assert abs(float(noise.std()) - 1) < 0.05
    floor = time_shift(scored[:64][batch.effect >= 0], shift)
    assert bool((rows.sigma[anchor] >= floor - 1e-6).all()) == (anchor_noise == "released")


def test_released_anchor_noise_without_backward_simulation(adapter):
    with make_trainer(adapter, objective={"anchor_noise": "released", "backward_simulation": False}) as trainer:
        assert raise_first([trainer.steps.student_step(*rolled(trainer))])["anchor"] > 0


def test_norm_rescale_keeps_the_norm_of_the_conditional_velocity(adapter):
    scores = []
    for rescale in (False, True):
        with make_trainer(adapter, objective={"norm_rescale": rescale}, sampler={"guidance": 4.0}) as trainer:
            rows = trainer.steps._student_rows(*rolled(trainer))
            scores.append(trainer.steps._score(rows, torch.zeros_like(rows.x)))
    plain, rescaled = scores
    guided = plain.teacher + 4 * (plain.teacher - plain.teacher_uncond)
    expected = guided * plain.teacher.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(rescaled.teacher, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(rescaled.teacher, rescaled.teacher_uncond)  # so that guidance adds nothing more
    assert torch.equal(rescaled.critic, plain.critic)


def test_general_rows_with_targets_are_anchored(adapter):
    data = random_data(adapter, ["effect_0", "effect_1", "effect_2"])
    targets = torch.randn(5, *adapter.latent_shape)
    data = dataclasses.replace(data, general_pairs=data.general_pairs[:5], general_targets=targets)
    with make_trainer(adapter, data) as trainer:
        batch = mixed_batch(trainer)
        rows = trainer.steps._student_rows(batch, trainer.steps.simulate(batch))
        anchored = rows.kind == ANCHOR
        assert torch.equal(rows.effect[anchored], batch.effect)
        assert int((rows.kind == TARGET_SIMULATION).sum()) == int((batch.effect >= 0).sum())
        sigma = rows.sigma[anchored][:, None, None]
        noise = rows.anchor_target + batch.target
        torch.testing.assert_close(rows.x[anchored], (1 - sigma) * batch.target + sigma * noise)
        assert torch.equal(trainer.steps._student_rows(batch, None).effect, batch.effect)
