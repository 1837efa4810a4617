"""Checkpoints that were damaged, cut, emptied or edited: refused in one sentence, or the one before is continued."""

from __future__ import annotations

import pytest
import torch
from helpers.trainers import changed, make_trainer, slots
from helpers.written import rewrite

from clora.errors import CloraError
from clora.testing import tiny_config
from clora.training.checkpoint import DamagedCheckpoint, load_values
from clora.training.resume import Checkpoints
from clora.training.steps import CRITIC, STUDENT

TRAIN = {"updates": 4, "checkpoint_every": 1}


def ignore(update, values):
    pass


@pytest.fixture
def written(adapter, tmp_path):
    """The checkpoints of a run of four updates, the last two, and its slots at the end."""
    with make_trainer(adapter, train=TRAIN) as trainer:
        trainer.fit(ignore, Checkpoints(tmp_path))
        return tmp_path, slots(trainer)


def test_the_newest_are_kept(adapter, tmp_path):
    train = {**TRAIN, "updates": 5}
    with make_trainer(adapter, train=train) as trainer:
        trainer.fit(ignore, Checkpoints(tmp_path, keep=3))
    assert [file.name for file in Checkpoints(tmp_path).files()] == [f"0000000{i}.safetensors" for i in (5, 4, 3)]


def test_every_flipped_bit_is_noticed(written):
    """In header and tensors: a file that is still read has another hash."""
    folder, _ = written
    file = Checkpoints(folder).path(4)
    whole, damaged = file.read_bytes(), 0
    generator = torch.Generator().manual_seed(0)
    header = int.from_bytes(whole[:8], "little") + 8
    # Half of the flips are in the header, though it is much the smaller part.
    places = [*torch.randint(header, (50,), generator=generator).tolist()]
    places += torch.randint(header, len(whole), (50,), generator=generator).tolist()
    for i, place in enumerate(places):
        content = bytearray(whole)
        content[place] ^= 1 << i % 8
        file.write_bytes(content)
        try:
            values = load_values(file)
        except DamagedCheckpoint:
            damaged += 1
        else:
            file.write_bytes(whole)
            assert values == load_values(file), "white space of the header, for instance"
    assert damaged >= 95


@pytest.mark.parametrize("size", [0, 4, 1000, -8])
def test_a_damaged_file_falls_back_to_the_one_before(adapter, written, capsys, size):
    folder, expected = written
    file = Checkpoints(folder).path(4)
    file.write_bytes(file.read_bytes()[:size])
    with make_trainer(adapter, train=TRAIN) as trainer:
        updates = []
        trainer.fit(lambda update, values: updates.append(update), Checkpoints(folder))
        assert updates == [4]
        assert not changed(trainer, expected)
    said = capsys.readouterr().err
    assert "00000004.safetensors is damaged" in said
    assert "remove it" not in said, "the one before is continued without that"
    assert load_values(file)["update"] == 4, "it is written anew"


def test_without_a_whole_file_nothing_is_trained(adapter, written):
    folder, _ = written
    for file in folder.iterdir():
        file.write_bytes(b"")
    with make_trainer(adapter, train=TRAIN) as trainer, pytest.raises(CloraError, match="none .* is whole; remove"):
        trainer.fit(ignore, Checkpoints(folder))


def without(prefix):
    def change(flat, values):
        for key in [key for key in flat if key.startswith(prefix)]:
            del flat[key]
        return values

    return change


def other(name, tensor):
    return lambda flat, values: flat.update({name: tensor}) or values


def value(name, found):
    return lambda flat, values: {**values, name: found}


ODD = {
    "a dtype of no run": value("dtype", "int8"),
    "no optimizer": without("optimizer/"),
    "no critic's optimizer": without(f"optimizer/{CRITIC}/"),
    "half of an optimizer": without(f"optimizer/{STUDENT}/0/"),
    "a part of an optimizer": without(f"optimizer/{STUDENT}/0/exp_avg_sq"),
    "an odd name": other("optimizer/student/x", torch.zeros(1)),
    "a number that is none": other("optimizer/student/x/step", torch.zeros(1)),
    "no generator": without("generator/"),
    "half a generator": other("generator/data", torch.zeros(7, dtype=torch.uint8)),
    "another type of generator": other("generator/data", torch.zeros(7)),
    "no factors": without("tensor/student.0"),
    "other shapes": other("tensor/student.0", torch.zeros(3)),
    "other types": other("tensor/general", torch.zeros(3)),
    "no update": lambda flat, values: {k: v for k, v in values.items() if k != "update"},
    "a text for the update": value("update", "4"),
    "no time": value("seconds", None),
    "no phase": value("matching", None),
    "no settings": value("config", None),
    "settings of another kind": value("config", {"train": 3}),
    "inputs of another kind": value("inputs", 3),
    "no values": lambda flat, values: [],
}


@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_what_is_missing_or_odd_is_one_clear_error(adapter, written, change):
    folder, _ = written
    for update in (3, 4):
        rewrite(Checkpoints(folder).path(update), change)
    with make_trainer(adapter, train={**TRAIN, "updates": 5}) as trainer:
        with pytest.raises(CloraError, match="none of the checkpoints .* is whole; remove"):
            trainer.fit(ignore, Checkpoints(folder))


@pytest.mark.parametrize("change", ODD.values(), ids=ODD.keys())
def test_the_one_before_is_continued_whatever_the_newest_lacks(adapter, written, capsys, change):
    folder, expected = written
    rewrite(Checkpoints(folder).path(4), change)
    checkpoints = Checkpoints(folder)
    with make_trainer(adapter, train=TRAIN) as trainer:
        trainer.fit(ignore, checkpoints)
        assert not changed(trainer, expected)
    assert capsys.readouterr().err.count("00000004.safetensors is damaged") == 1
    assert load_values(checkpoints.path(4))["update"] == 4, "it is written anew"


def test_a_file_of_this_version_has_a_hash(adapter, written):
    folder, _ = written
    for update in (3, 4):
        rewrite(Checkpoints(folder).path(update), lambda flat, values: values, hashed=False)
    with make_trainer(adapter, train=TRAIN) as trainer, pytest.raises(CloraError, match="none .* is whole"):
        trainer.fit(ignore, Checkpoints(folder))
    for update in (3, 4):  # one of an earlier version
        rewrite(Checkpoints(folder).path(update), lambda flat, values: without_key(values, "inputs"), hashed=False)
    with make_trainer(adapter, train=TRAIN) as trainer:
        trainer.fit(ignore, Checkpoints(folder))
        assert trainer.update == 4


def without_key(values, key):
    return {k: v for k, v in values.items() if k != key}


def test_the_update_that_is_named_to_the_user_is_of_a_file_that_was_verified(written):
    folder, _ = written
    checkpoints = Checkpoints(folder)
    assert checkpoints.last_update() is None
    checkpoints.path(4).write_bytes(b"")
    checkpoints.start(tiny_config([f"effect_{i}" for i in range(3)], train=TRAIN))
    assert checkpoints.last_update() == 3


def test_more_updates_than_are_asked_for_are_refused(adapter, written):
    """The collection would state fewer than its student has made."""
    folder, _ = written
    with make_trainer(adapter, train={**TRAIN, "updates": 2}) as trainer:
        with pytest.raises(CloraError, match=r"has made 4 updates, more than train\.updates: 2; set that to 4"):
            trainer.fit(ignore, Checkpoints(folder))


RATES = {
    "both": ({"learning_rate": 1e-4, "anchor_learning_rate": 5e-4}, ["learning_rate", "anchor_learning_rate"]),
    "the anchoring": ({"anchor_learning_rate": 5e-4}, ["anchor_learning_rate"]),
    "all but anchoring's": ({"learning_rate": 1e-4, "anchor_learning_rate": 1e-2}, ["learning_rate"]),
    "the critic's": ({"critic_learning_rate": 1e-5}, ["critic_learning_rate"]),
}


@pytest.mark.parametrize(("rates", "named"), RATES.values(), ids=RATES.keys())
def test_each_rate_is_compared_with_what_it_was(adapter, written, capsys, rates, named):
    folder, _ = written
    with make_trainer(adapter, train={**TRAIN, "updates": 5, **rates}) as trainer:
        trainer.fit(ignore, Checkpoints(folder))
    said = capsys.readouterr().err
    lowered = [
        name for name in ("learning_rate", "anchor_learning_rate", "critic_learning_rate") if f"train.{name} is" in said
    ]
    assert lowered == named


def test_a_rate_of_anchoring_that_rises_is_refused(adapter, written):
    folder, _ = written
    with make_trainer(adapter, train={**TRAIN, "learning_rate": 1e-3, "anchor_learning_rate": 2e-2}) as trainer:
        with pytest.raises(CloraError, match=r"train\.anchor_learning_rate was"):
            trainer.fit(ignore, Checkpoints(folder))


def test_learning_rates_may_be_lowered(adapter, written, capsys):
    folder, _ = written
    lower = {**TRAIN, "updates": 5, "learning_rate": 1e-3}
    with make_trainer(adapter, train=lower) as trainer:
        trainer.fit(ignore, Checkpoints(folder))
    assert "train.learning_rate is 0.001 from update 4 on; it was 0.01" in capsys.readouterr().err
    with make_trainer(adapter, train={**TRAIN, "updates": 6}) as trainer:
        with pytest.raises(CloraError, match=r"train\.learning_rate was"):
            trainer.fit(ignore, Checkpoints(folder))


def test_other_inputs_are_named(adapter, tmp_path):
    inputs = {"picture a.png": "1", "picture b.png": "2"}
    with make_trainer(adapter, train={**TRAIN, "updates": 1}) as trainer:
        trainer.fit(ignore, Checkpoints(tmp_path, inputs=inputs))
    for found in (
        {"picture a.png": "1", "picture b.png": "3"},
        {"picture a.png": "1"},
        {**inputs, "picture c.png": "1"},
    ):
        with make_trainer(adapter, train=TRAIN) as trainer:
            with pytest.raises(CloraError, match=r"other inputs:\n  picture [bc]\.png (has changed|is gone|is new)\n"):
                trainer.fit(ignore, Checkpoints(tmp_path, inputs=found))


@pytest.mark.parametrize(
    ("train", "is_end"), [({}, True), ({"updates": 9}, False), ({"updates": 9, "minutes": 1e-9}, True)]
)
def test_an_end_is_the_checkpoint_of_all_updates_or_of_all_minutes(written, train, is_end):
    """A longer run's, that another was stopped in, must not take the place of a finished run's last one."""
    config = tiny_config([f"effect_{i}" for i in range(3)], train={**TRAIN, **train})
    assert Checkpoints(written[0]).has_end(config) == is_end


def test_only_divergence_goes_back(adapter, written, monkeypatch):
    """A file that is missing while batches are read says nothing about the checkpoints, whatever their losses."""
    folder, _ = written
    rewrite(Checkpoints(folder).path(4), value("calm", False))
    with make_trainer(adapter, train={**TRAIN, "updates": 5}) as trainer:
        with monkeypatch.context() as patch:
            patch.setattr(trainer.sampler, "draw", missing_file)
            with pytest.raises(CloraError) as caught:
                trainer.fit(ignore, Checkpoints(folder))
        assert str(caught.value) == "update 5: a file was removed"
        trainer.fit(ignore, Checkpoints(folder))
        assert trainer.update == 5


def missing_file(update):
    raise CloraError("a file was removed")


def test_a_run_that_diverges_does_not_go_back_to_a_damaged_file(adapter, written):
    folder, _ = written
    rewrite(Checkpoints(folder).path(4), lambda flat, values: without_key(values, "update"))
    run = Checkpoints(folder)
    with make_trainer(adapter, train=TRAIN) as trainer:
        trainer.steps.change = lambda slots: torch.tensor(99.0)
        with pytest.raises(CloraError, match=r"update 4: .* exploded.* The checkpoint of update 3 is kept"):
            trainer.fit(ignore, run)
    assert run.last_update() == 3
    assert [file.name for file in run.files()] == ["00000003.safetensors"]
