"""Files of a run that were cut, flipped, emptied or zeroed: rebuilt, passed over or refused, and never trained on."""

from __future__ import annotations

import random
import shutil
import signal

import pytest
from helpers.fault_runs import Fault
from helpers.jobs import make_job
from helpers.written import DAMAGES, Written, flip, zeros

from clora.collection.metadata import LORA_FILE
from clora.collection.write import CARD_FILE, SCHEDULER_FILE
from clora.commands.distill import CHECKPOINT, FINISHED

by_name = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@pytest.fixture(scope="session")
def half_way(tree, whole, tmp_path_factory):
    """An output with two checkpoints and all entries of the cache, of a run killed before it exports."""
    job = make_job(tmp_path_factory.mktemp("half_way"), tree)
    assert job.run(Fault(whole[1]["exporting"][0], (signal.SIGKILL,)))[0] == -signal.SIGKILL
    return job.output


@pytest.fixture(scope="session")
def longer(tree, tmp_path_factory):
    """What an undisturbed run of six updates writes."""
    job = make_job(tmp_path_factory.mktemp("longer"), tree)
    code, said = job.run(train__updates=6)
    assert code == 0, said
    return Written.read(job.output)


def spoil(files, damage, seed=0):
    chance = random.Random(seed)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(damage(content, chance))


@pytest.mark.parametrize("damage", [pytest.param(d, marks=() if d is flip else pytest.mark.slow) for d in DAMAGES])
def test_every_entry_of_the_cache_and_the_newest_checkpoint(job, whole, half_way, damage):
    shutil.copytree(half_way, job.output)
    entries = sorted(job.output.rglob(f"{'[0-9a-f]' * 64}.safetensors"))
    newest = job.output / CHECKPOINT / "00000004.safetensors"
    spoil([*entries, newest], damage)
    code, said = job.run()
    assert code == 0, said
    for file in (*entries, newest):
        assert f"{file} is damaged" in said
    assert "resuming at update 2" in said
    assert Written.read(job.output) == whole[0]


@by_name
@pytest.mark.slow
def test_all_checkpoints(job, half_way, damage):
    shutil.copytree(half_way, job.output)
    spoil((job.output / CHECKPOINT).iterdir(), damage)
    code, said = job.run()
    assert code == 1
    assert "none of the checkpoints" in said
    assert "remove that folder to start from the beginning" in said
    assert "Traceback" not in said


def test_damaged_weights_are_made_again(job, whole):
    assert_made_again(job, whole, LORA_FILE, flip)


@by_name
@pytest.mark.slow
@pytest.mark.parametrize("name", [LORA_FILE, SCHEDULER_FILE])
def test_a_damaged_collection_is_made_again(job, whole, name, damage):
    assert_made_again(job, whole, name, damage)


def assert_made_again(job, whole, name, damage):
    shutil.copytree(whole[2], job.output)
    spoil([job.output / name], damage)
    code, said = job.run()
    assert code == 0, said
    assert "Traceback" not in said
    assert Written.read(job.output) == whole[0]


@pytest.mark.slow
def test_a_card_that_has_lost_its_mark_may_be_a_persons(job, whole):
    shutil.copytree(whole[2], job.output)
    spoil([job.output / CARD_FILE], zeros)
    code, said = job.run()
    assert code == 1
    assert "holds another README.md; choose an empty or a new folder" in said


@by_name
@pytest.mark.slow
def test_a_damaged_last_checkpoint_is_not_gone_on_from(job, whole, longer, damage):
    shutil.copytree(whole[2], job.output)
    spoil([job.output / FINISHED], damage)
    code, said = job.run(train__updates=6)
    assert code == 0, said
    assert "going on" not in said
    assert Written.read(job.output) == longer
