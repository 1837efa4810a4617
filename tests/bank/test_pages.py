"""Teachers that wait on the host: the same results to the bit as with all of them on the device."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.trainers import make_trainer, rolled, same, slots

from clora.bank.bank import AdapterBank
from clora.bank.pages import Pages, host_factors, pages_that_fit, resident_bytes, stack_bytes, teacher_pages
from clora.bank.slots import Stack, module_ranks, ranks_of
from clora.data.rendering import Samples, render_targets
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.state import LoRAState
from clora.testing import merge_lora, random_data, random_lora, random_teachers, tiny_config
from clora.training.steps import CRITIC, STUDENT

SHAPES = {"a": (7, 5), "b": (3, 4)}


def loras(count):
    """LoRA i: rank ``1 + i % 3`` of module a, every second one of module b too; all its numbers are i + 1."""

    def factors(module, rank, value):
        n, k = SHAPES[module]
        return torch.full((rank, k), value), torch.full((n, rank), value)

    return [
        {module: factors(module, 1 + i % 3, i + 1.0) for module in ("a", "b")[: 1 + i % 2]} for i in range(count)
    ]  # fmt: skip


def make_pages(count, pages):
    """Pages of the highest ranks; a LoRA sees its own modules, at least two ranks of each."""
    factors = {m: (torch.full((pages, 3, k), torch.nan), torch.full((pages, n, 3), torch.nan))
               for m, (n, k) in SHAPES.items()}  # fmt: skip
    pool, given = Stack(factors, torch.ones(pages)), loras(count)
    views = [pool.cut({module: max(2, len(a)) for module, (a, _) in lora.items()}) for lora in given]
    on_host = [host_factors(lora, torch.float32, pinned=False) for lora in given]
    return Pages(views, on_host, pages, torch.device("cpu")), views


def content(views, page):
    """The LoRA in a page, which must be whole: its ranks, and zero in those up to the ranks of its stack."""
    i = int(views[0].factors["a"][0][page, 0, 0]) - 1
    own = loras(i + 1)[i]
    assert set(views[i].factors) == set(own)
    for module, (a, b) in views[i].row(page).items():
        (n, k), rank = SHAPES[module], len(own[module][0])
        assert torch.equal(a, torch.cat([own[module][0], torch.zeros(len(a) - rank, k)]))
        assert torch.equal(b, torch.cat([own[module][1], torch.zeros(n, len(a) - rank)], dim=1))
    return i


def test_the_least_recently_used_leaves_first():
    pages, stacks = make_pages(6, 3)
    place = {}
    for wanted in ([0, 1], [2], [0], [3]):  # 3 takes the page of 1
        with pages.held(wanted) as found:
            place |= found
            assert [content(stacks, found[i]) for i in wanted] == wanted
    assert place[3] == place[1]
    with pages.held([0, 2]) as found:
        assert found == {0: place[0], 2: place[2]}, "these never left"


def test_nothing_that_is_held_or_wanted_is_overwritten():
    pages, stacks = make_pages(6, 3)
    with pages.held([0, 1]) as first:
        pages.fetch([2, 3, 4])  # one page is left
        assert [content(stacks, first[i]) for i in (0, 1)] == [0, 1]
        with pages.held([2]) as second:
            pages.fetch([5])  # none is left
            assert content(stacks, second[2]) == 2
            assert [content(stacks, first[i]) for i in (0, 1)] == [0, 1]
    with pages.held([2, 5, 3]) as found:
        assert [content(stacks, found[i]) for i in (2, 5, 3)] == [2, 5, 3]


def test_what_was_fetched_is_not_copied_again():
    pages, stacks = make_pages(6, 3)
    pages.fetch([4, 5])
    place = {content(stacks, page): page for page in (0, 1)}
    for a, _ in stacks[5].factors.values():
        a.fill_(torch.nan)
    with pages.held([5, 4]) as found:
        assert found == place
        assert all(a.isnan().all() for a, _ in stacks[5].factors.values())


def test_bytes_of_a_page_and_pages_of_a_budget(adapter):
    ranks = module_ranks([{"a": 2}, {"a": 1, "b": 3}])
    assert ranks == {"a": 2, "b": 3}
    one = stack_bytes(SHAPES, ranks, torch.float32)
    assert one == 4 * (2 * 12 + 3 * 7)
    assert stack_bytes(SHAPES, {"a": 2, "b": 9}, torch.bfloat16) == 2 * (8 * 12 + 16 * 7), "multiples of 8 in 16 bits"
    teachers = [{"a": 2}] * 5 + [{"a": 1, "b": 3}] * 5
    resident = resident_bytes(SHAPES, teachers, torch.float32)
    assert resident == 4 * (5 * 2 * 12 + 5 * (1 * 12 + 3 * 7))

    def fit(budget):
        return pages_that_fit(budget / 1e9, SHAPES, teachers, torch.float32)

    assert pages_that_fit(None, SHAPES, teachers, torch.float32) is None
    assert fit(resident) is None
    assert fit(resident - 1) == (resident - 1) // one
    assert fit(2.5 * one) == 2
    with pytest.raises(CloraError, match=r"teacher_memory_gb: .* hold 1 teachers.*at least 2.*set it to"):
        fit(1.5 * one)


def test_a_slot_takes_its_own_ranks_and_a_page_the_highest_of_the_paged(adapter):
    transformer = adapter.pipeline.transformer
    shapes = linear_shapes(transformer)
    states = random_teachers(transformer, 3)
    high = {"critic": random_lora(transformer, 40, 9)}
    with AdapterBank(transformer, high | states, fixed=1) as resident:
        pass
    with AdapterBank(transformer, high | states, pages=2, fixed=1) as paged:
        pass
    teachers = [ranks_of(state) for state in states.values()]
    critic = 4 * high["critic"].num_parameters
    assert resident.bytes() == (critic + resident_bytes(shapes, teachers, torch.float32), 0)
    one = stack_bytes(shapes, module_ranks(teachers), torch.float32)
    assert paged.bytes() == (critic + 2 * one, 4 * sum(state.num_parameters for state in states.values()))
    assert one == 4 * random_lora(transformer, 4, 0).num_parameters
    given = list(states.values())
    assert teacher_pages(None, transformer, given) is None
    assert teacher_pages(2.2e-9 * one, transformer, given) == 2
    for name, state in states.items():
        assert same(paged.state(name), state)
        assert same(resident.state(name), state)
    assert paged.squared_norms() == pytest.approx(resident.squared_norms(), rel=1e-12)


def test_a_routed_batch_of_paged_loras_equals_merged_weights(adapter, inputs):
    transformer = adapter.pipeline.transformer
    states, (x, sigma, conditioning) = random_teachers(transformer, 4), inputs(5)
    models = [merge_lora(transformer, state) for state in states.values()]
    ids = torch.tensor([3, 0, -1, 1, 3])
    with torch.no_grad(), AdapterBank(transformer, states, pages=2, fixed=1) as bank:
        with bank.placed(ids) as slots, bank.route(slots, ids):
            found = adapter.velocity(x, sigma, conditioning)
    own = adapter.pipeline.transformer
    for i, e in enumerate(ids.tolist()):
        adapter.pipeline.transformer = own if e < 0 else models[e]
        with torch.no_grad():
            expected = adapter.velocity(x[[i]], sigma[[i]], conditioning[[i]])
        torch.testing.assert_close(found[[i]], expected, rtol=1e-4, atol=1e-5)
    adapter.pipeline.transformer = own


def test_rows_are_split_by_their_number_and_by_pages(adapter):
    transformer = adapter.pipeline.transformer
    with AdapterBank(transformer, random_teachers(transformer, 5), pages=2, fixed=1) as bank:
        pass
    ids = torch.tensor([0, 0, 1, 2, -1, 1, 3, 3, 4, 0, 3])
    assert bank.chunks(ids, 100) == [slice(0, 6), slice(6, 11)]
    assert bank.chunks(ids, 4) == [slice(0, 4), slice(4, 8), slice(8, 11)]


def train(adapter, pages, **settings):
    """Reports, student and critic after two updates on three teachers, and the rows of every pass."""
    reports, sizes = [], []
    hook = adapter.pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with make_trainer(adapter, pages=pages, **settings) as trainer:
        trainer.fit(lambda update, values: reports.append(dict(values)))
        trained = {name: state for name, state in slots(trainer).items() if name in (STUDENT, CRITIC)}
    hook.remove()
    return reports, trained, sizes


def test_training_is_the_same_to_the_bit(adapter):
    settings = {"train": {"updates": 5, "batch_size": 2, "critic_ratio": 2}, "objective": {"switch_probability": 1.0}}
    (expected, states, sizes), (found, paged, again) = (train(adapter, pages, **settings) for pages in (None, 2))
    assert found == expected
    assert again == sizes
    assert all(same(paged[name], states[name]) for name in (STUDENT, CRITIC))


def test_a_batch_of_more_teachers_than_pages_is_scored_in_parts(adapter):
    settings = {"train": {"batch_size": 8, "gradient_rows": None}, "objective": {"switch_probability": 1.0}}
    (expected, _, sizes), (found, _, again) = (train(adapter, pages, **settings) for pages in (None, 2))
    assert max(again) < max(sizes)
    assert sum(again) == sum(sizes)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_the_students_teachers_are_fetched_before_its_rollout(adapter, monkeypatch):
    """And nothing else is: what the scoring pass asks for is there already."""
    events = []
    with make_trainer(adapter, pages=2, train={"batch_size": 2, "updates": 3, "critic_ratio": 2}) as trainer:
        fetch, score, simulate = Pages.fetch, trainer.steps._score, trainer.steps.simulate

        def copied(pages, wanted):
            missing = [lora for lora in wanted if lora not in pages._page]
            events.extend(["fetch"] if missing else [])
            fetch(pages, wanted)

        monkeypatch.setattr(Pages, "fetch", copied)
        monkeypatch.setattr(trainer.steps, "_score", lambda *a: events.append("score") or score(*a))
        monkeypatch.setattr(trainer.steps, "simulate", lambda *a: events.append("rollout") or simulate(*a))
        trainer.fit(lambda update, values: None)
    assert events.count("fetch") > 1
    assert events.count("score") == 3
    for before, event, after in zip(events, events[1:], events[2:], strict=False):
        assert event != "fetch" or (before, after) == ("rollout", "rollout")


def test_the_scored_critic_is_the_trained_one(adapter):
    """Its slot follows every step, also when it starts from the student and when a run is resumed."""
    with make_trainer(adapter) as trainer:
        batch, rollout = rolled(trainer)
        before = trainer.bank.state(CRITIC)
        assert same(before, trainer.critic.state(CRITIC))
        trainer.steps.critic_step(batch, rollout)
        assert same(trainer.bank.state(CRITIC), trainer.critic.state(CRITIC))
        assert not same(trainer.bank.state(CRITIC), before)
        trainer.steps.start_critic()
        assert same(trainer.bank.state(CRITIC), trainer.student.state(STUDENT))


def test_trained_loras_are_fp32_over_a_bf16_base(adapter):
    """Steps far below a bf16 rounding add up."""
    transformer = copy.deepcopy(adapter.pipeline.transformer).bfloat16()
    state = random_lora(transformer, 3, 0)
    bank = AdapterBank(transformer, {"critic": state}, fixed=1)
    trained = bank.trained("critic", state)
    assert {factor.dtype for factor in trained.parameters()} == {torch.float32}
    assert {factor.dtype for factor in bank.slots().parameters()} == {torch.bfloat16}
    assert same(trained.state("critic"), state), "the master is not rounded"
    with torch.no_grad():
        for factor in trained.parameters():
            factor.mul_(1 + 2.0**-12)
    bank.write("critic", trained)
    for name, module in trained.state("critic").modules.items():
        assert torch.equal(bank.state("critic").modules[name].lora_A, module.lora_A.bfloat16())
        assert not torch.equal(module.lora_A, state.modules[name].lora_A)
    with pytest.raises(ValueError, match="dtype=torch.float32"):
        bank.slots(trainable=True)
    with pytest.raises(CloraError, match="unknown module 'proj_outt'"):
        bank.trained("critic", LoRAState({"proj_outt": next(iter(state.modules.values()))}))


@pytest.mark.parametrize("sources", [3, 1])
def test_rendering_is_the_same_to_the_bit(adapter, sources):
    """A batch has one teacher, whatever the budget."""
    teachers = random_teachers(adapter.pipeline.transformer, 4)
    ranks = module_ranks([ranks_of(state) for state in teachers.values()])
    one = stack_bytes(linear_shapes(adapter.pipeline.transformer), ranks, torch.float32)
    data = random_data(adapter, list(teachers), sources=sources)
    results, passes = [], []
    for budget in (None, 2.5e-9 * one):
        config = tiny_config(list(teachers), train={"teacher_memory_gb": budget, "forward_rows": 6})
        samples = Samples.of_teachers(data.sources, data.teacher_text, data.empty_text, config.seed)
        report = []
        results.append(torch.stack(list(render_targets(adapter, teachers, samples, data.text, config, report.append))))
        passes.append(report)
    assert passes[0] == passes[1]
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_on_a_side_stream_wait_for_the_passes_and_the_passes_for_them():
    """Passes are enqueued far ahead of the GPU, while pages are replaced all the time."""
    generator = torch.Generator().manual_seed(0)
    size, count = 2048, 8
    lora = [
        (torch.randn(64, size, generator=generator), torch.randn(size, 64, generator=generator)) for _ in range(count)
    ]
    factors = {"m": (torch.zeros(3, 64, size, device="cuda"), torch.zeros(3, size, 64, device="cuda"))}
    stack = Stack(factors, torch.ones(3, device="cuda"))
    on_host = [host_factors({"m": pair}, torch.float32, pinned=True) for pair in lora]
    pages = Pages([stack] * count, on_host, 3, torch.device("cuda"))
    x = torch.randn(4096, size, generator=generator).cuda()
    found, order = [], [int(i) for i in torch.randint(count, (60,), generator=generator)]
    for i, following in zip(order, [*order[1:], 0], strict=True):
        with pages.held([i]) as page:
            pages.fetch([following])
            a, b = stack.row(page[i])["m"]
            found.append((x @ a.mT @ b.mT).square().sum())
    expected = [(x @ a.cuda().mT @ b.cuda().mT).square().sum() for a, b in lora]
    assert torch.equal(torch.stack(found), torch.stack([expected[i] for i in order]))
