"""Requests to a language model, and templates in place of answers that are of no use."""

from __future__ import annotations

import pytest

from clora.commands.prompts.wording import (
    TRIES,
    Written,
    describe_effect,
    effect_request,
    join_general,
    templates,
    write_general,
    write_texts,
)
from clora.commands.prompts.writers import Writer
from clora.config.everyday import everyday_instructions, everyday_topics

PROMPT = "turn this into a blueprint."
GOOD = ["thin white lines on blue", "the scene as a technical drawing", "blue paper, white ink"]


def always(texts):
    return texts


@pytest.fixture
def make_writer():
    """Returns make_writer(*answers, sees=False): gives them in turn, raising those that are errors; keeps the calls."""

    def make(*answers, sees=False):
        calls = []

        def answer(request, seed):
            calls.append((request, seed))
            found = answers[min(len(calls), len(answers)) - 1]
            if isinstance(found, Exception):
                raise found
            return found

        return Writer("a model", sees, answer), calls

    return make


def test_the_first_template_is_the_prompt_itself():
    found = templates(PROMPT)
    assert found[0] == PROMPT
    assert all("turn this into a blueprint" in text for text in found)
    assert len(set(found)) == len(found) >= 6
    assert templates("{x} %s")[1].endswith("{x} %s")


def test_a_good_answer(make_writer):
    writer, calls = make_writer("\n".join(GOOD))
    assert describe_effect(writer, PROMPT, (), 3, "s", always) == Written(GOOD, "a model", None)
    assert len(calls) == 1


def test_more_than_wanted_is_cut(make_writer):
    writer, _ = make_writer("\n".join(GOOD))
    assert describe_effect(writer, PROMPT, (), 2, "s", always).texts == GOOD[:2]


def test_asked_again_with_another_seed_until_there_are_enough(make_writer):
    writer, calls = make_writer(GOOD[0], f"{GOOD[0]}\n{GOOD[1]}", GOOD[2])
    assert describe_effect(writer, PROMPT, (), 3, "s", always) == Written(GOOD, "a model", None)
    assert len({seed for _, seed in calls}) == 3


def test_too_few_are_filled_up_with_templates(make_writer):
    writer, calls = make_writer(GOOD[0])
    written = describe_effect(writer, PROMPT, (), 3, "s", always)
    assert len(calls) == TRIES
    assert written.texts == [GOOD[0], *templates(PROMPT)[:2]]
    assert written.by == "a model and, for 2, templates"
    assert written.reason == "1 of 3 usable from a model in 3 answers"


@pytest.mark.parametrize("answer", ["", "garbage \ufffd", RuntimeError("out of memory")])
def test_no_use_at_all(make_writer, answer):
    writer, calls = make_writer(answer)
    written = describe_effect(writer, PROMPT, (), 3, "s", always)
    assert (written.texts, written.by) == (templates(PROMPT)[:3], "templates")
    if isinstance(answer, Exception):
        assert written.reason == "a model failed: RuntimeError: out of memory"
        assert len(calls) == 1
    else:
        assert written.reason == "0 of 3 usable from a model in 3 answers"


def test_what_was_written_before_a_failure_is_kept(make_writer):
    writer, _ = make_writer(GOOD[0], ValueError("no"))
    written = describe_effect(writer, PROMPT, (), 2, "s", always)
    assert written.texts == [GOOD[0], PROMPT]
    assert written.reason == "a model failed: ValueError: no"


def test_a_key_press_is_no_failure(make_writer):
    def stop(request, seed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        describe_effect(Writer("a", False, stop), PROMPT, (), 2, "s", always)


def test_too_long_for_the_text_encoder(make_writer):
    writer, _ = make_writer("\n".join(GOOD))
    written = describe_effect(writer, PROMPT, (), 2, "s", lambda texts: [text for text in texts if len(text) < 25])
    assert written.texts == [GOOD[0], GOOD[2]]


def test_without_a_writer():
    assert describe_effect(None, PROMPT, (), 2, "s", always) == Written(templates(PROMPT)[:2], "templates", None)
    count = len(templates(PROMPT))
    many = describe_effect(None, PROMPT, (), 50, "s", always)
    assert (many.texts, many.reason) == (templates(PROMPT), f"{count} of 50: there are no more templates")


def test_pictures_go_to_a_writer_that_sees(make_writer, pair):
    writer, calls = make_writer("\n".join(GOOD), sees=True)
    describe_effect(writer, PROMPT, [pair, pair], 3, "s", always)
    (request,) = [request for request, _ in calls]
    assert [part for part in request if not isinstance(part, str)] == [*pair, *pair]
    assert [part for part in request if isinstance(part, str)][1:5] == [
        f"Example {i}, {when}:" for i in (1, 2) for when in ("before", "after")
    ]
    assert PROMPT in request[-1]
    assert "3 different ways" in request[-1]
    blind, calls = make_writer("\n".join(GOOD))
    describe_effect(blind, PROMPT, [pair, pair], 3, "s", always)
    assert calls[0][0] == effect_request(PROMPT, (), 3)
    assert all(isinstance(part, str) for part in calls[0][0])


def test_seeds_depend_on_nothing_but_the_name(make_writer):
    seeds = []
    for name in ("1/a", "1/a", "1/b", "2/a"):
        writer, calls = make_writer("")
        write_texts(writer, ["?"], 1, name, always)
        seeds.append([seed for _, seed in calls])
    assert seeds[0] == seeds[1]
    assert len({seed for some in seeds for seed in some}) == 3 * TRIES
    assert all(0 <= seed < 2**32 for some in seeds for seed in some)


def test_general_instructions_are_written_about_every_topic_and_mixed(make_writer):
    topics = list(everyday_topics())

    def answer(request, seed):
        topic = next(i for i, topic in enumerate(topics) if f"about {topic}:" in request[0])
        assert all(example in request[0] for example in everyday_topics()[topics[topic]][:2])
        return "\n".join(f"change number {topic} like {letter}" for letter in "abc")

    parts = list(write_general(Writer("a model", False, answer), 30, "s", always))
    assert [len(part.texts) for part in parts] == [3] * len(topics)
    joined = join_general(parts, 30)
    assert joined.texts[:13] == [f"change number {i} like a" for i in range(12)] + ["change number 0 like b"]
    assert (len(joined.texts), joined.by, joined.reason) == (30, "a model", None)


def test_general_instructions_that_ship_stand_in(make_writer):
    writer, calls = make_writer("make it all of glass", RuntimeError("no"))
    joined = join_general(list(write_general(writer, 24, "s", always)), 5)
    assert len(calls) == 3, "the first topic, an error; the second, an error; no third"
    assert joined.texts == ["make it all of glass", *everyday_instructions()[:4]]
    assert joined.by == "a model and, for 4, templates"
    assert joined.reason == "a model failed: RuntimeError: no"
    assert join_general([], 7) == Written(list(everyday_instructions()[:7]), "templates", None)
    too_many = join_general([], 10_000)
    assert too_many.texts == list(everyday_instructions())
    assert "of 10000" in too_many.reason
