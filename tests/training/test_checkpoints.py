"""Checkpoints that were damaged, cut, emptied or edited: refused in one sentence, or the one before is continued."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.trainers import changed, make_trainer, slots
from safetensors import safe_open
from safetensors.torch import save_file

from clora.errors import CloraError
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
    assert "00000004.safetensors is damaged" in capsys.readouterr().err
    assert load_values(file)["update"] == 4, "it is written anew"


def test_without_a_whole_file_nothing_is_trained(adapter, written):
    folder, _ = written
    for file in folder.iterdir():
        file.write_bytes(b"")
    with make_trainer(adapter, train=TRAIN) as trainer, pytest.raises(CloraError, match="none .* is whole; remove"):
        trainer.fit(ignore, Checkpoints(folder))


def rewrite(file, change):
    """Changes tensors and values of a file as an earlier version would have written it, without a hash."""
    with safe_open(file, "pt") as opened:
        flat, values = {k: opened.get_tensor(k) for k in opened.keys()}, json.loads(opened.metadata()["values"])  # noqa: SIM118
    values = change(flat, values)
    save_file(flat, file, {"values": json.dumps(values)})


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
        with pytest.raises(CloraError, match="checkpoint.* remove "):
            trainer.fit(ignore, Checkpoints(folder))


def test_learning_rates_may_be_lowered(adapter, written, capsys):
    folder, _ = written
    lower = {**TRAIN, "updates": 5, "learning_rate": 1e-3}
    with make_trainer(adapter, train=lower) as trainer:
        trainer.fit(ignore, Checkpoints(folder))
    assert "train.learning_rate is 0.001 from update 4 on; it was 0.01" in capsys.readouterr().err
    with make_trainer(adapter, train={**TRAIN, "updates": 6}) as trainer:
        with pytest.raises(CloraError, match=r"train\.learning_rate differ"):
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
