"""Runs that die at a place of their writing, or at any time: the next one ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time

import pytest
from helpers.fault_runs import Fault
from helpers.written import Written, assert_all_whole, phases

from clora.collection.write import SCHEDULER_FILE

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are killed as on POSIX")
PHASES = ("encoding", "rendering", "training", "exporting", "ending")


def kill(place, is_torn):
    return Fault(place, (signal.SIGKILL,), is_torn=is_torn)


def assert_goes_on(job, whole):
    """Runs the job again: it ends like an undisturbed run."""
    assert_all_whole(job.output)
    code, said = job.run()
    assert code == 0, said
    assert "Traceback" not in said
    assert Written.read(job.output) == whole[0]


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_goes_on(job, whole, phase):
    chance = random.Random(phase)
    assert job.run(kill(chance.choice(whole[1][phase]), is_torn=True))[0] == -signal.SIGKILL
    assert_goes_on(job, whole)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(40))
def test_a_run_killed_at_any_place_goes_on(job, whole, seed):
    chance = random.Random(seed)
    places = whole[1][chance.choice(PHASES)]
    assert job.run(kill(chance.choice(places), is_torn=chance.random() < 0.5))[0] == -signal.SIGKILL
    assert_goes_on(job, whole)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_at_any_time_goes_on(job, whole, seed):
    run = job.start()
    time.sleep(random.Random(seed).uniform(0.2, 3))
    run.process.kill()
    assert run.end() in (0, -signal.SIGKILL)
    assert_goes_on(job, whole)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_a_run_killed_again_and_again_goes_on(job, whole, seed):
    chance = random.Random(seed)
    for _ in range(5):
        # Of a run that goes on, places are other ones than of a whole run.
        assert job.run(kill(chance.randrange(20, 60), is_torn=True))[0] == -signal.SIGKILL
        assert_all_whole(job.output)
    assert_goes_on(job, whole)


@pytest.mark.slow
def test_a_collection_is_replaced_whole(job, whole):
    """A run of another schedule, over a finished collection, dies at places of its export."""
    settings = {"sampler__shift": 2.0}
    shutil.copytree(whole[2], job.output)
    undisturbed = job.start(**settings)
    assert undisturbed.end() == 0, undisturbed.said
    expected, places = Written.read(job.output), phases(undisturbed.places)["exporting"]
    assert expected.files[SCHEDULER_FILE] != whole[0].files[SCHEDULER_FILE]
    for place in random.Random(0).sample(places, 8):
        shutil.rmtree(job.output)
        shutil.copytree(whole[2], job.output)
        assert job.run(kill(place, is_torn=True), **settings)[0] == -signal.SIGKILL
        assert_all_whole(job.output)
        assert job.run(**settings)[0] == 0
        assert Written.read(job.output) == expected
