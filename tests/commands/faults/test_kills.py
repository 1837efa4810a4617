"""Runs that die at a place of their writing, or at any time: the next one ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from helpers.fault_runs import Fault
from helpers.written import Written, assert_all_whole

pytestmark = pytest.mark.skipif(os.name == "nt", reason="processes are killed as on POSIX")
PHASES = ("encoding", "rendering", "training", "exporting")


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
