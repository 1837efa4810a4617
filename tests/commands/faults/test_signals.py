"""Runs that are asked to stop, at each of their phases: exit code, message, and a result as if they had not been."""

from __future__ import annotations

import os
import random
import signal

import pytest
from helpers.fault_runs import Fault
from helpers.written import Written, assert_all_whole

from clora.commands.distill import CHECKPOINT

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
PHASES = ("encoding", "rendering", "training", "exporting")
QUICK = [("rendering", "SIGHUP"), ("training", "SIGTERM"), ("exporting", "SIGINT")]
OTHERS = [("encoding", "SIGTERM"), *((phase, "SIGINT") for phase in PHASES[:3]), ("exporting", "SIGHUP")]
"""Each phase with Ctrl-C and with one other signal: SIGTERM and SIGHUP differ only in their number (`clora.stopping`)."""
ALL = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHERS)]


def assert_stopped(job, found, name):
    code, said = found
    assert code == CODES[name], said
    assert "Traceback" not in said
    assert f"to go on: clora distill {job.folder.parent / 'out.yaml'}" in said
    assert_all_whole(job.output)


def assert_goes_on(job, whole):
    code, said = job.run()
    assert code == 0, said
    assert Written.read(job.output) == whole[0]


@pytest.mark.parametrize(("phase", "name"), ALL)
def test_a_signal_at_any_place(job, whole, phase, name):
    place = random.Random(phase + name).choice(whole[1][phase])
    found = job.run(Fault(place, (signal.Signals[name],)))
    assert_stopped(job, found, name)
    if phase == "training":
        assert "the same command goes on from update" in found[1]
    assert_goes_on(job, whole)


def test_a_second_ctrl_c_stops_at_once(job, whole):
    """The first lets the update end and its checkpoint be written; here the second comes while that is written."""
    found = job.run(Fault(whole[1]["training"][2], (signal.SIGINT, signal.SIGINT)))
    assert_stopped(job, found, "SIGINT")
    assert "Ctrl-C again stops at once" in found[1]
    assert not list((job.output / CHECKPOINT).iterdir()), "it was not written to its end"
    assert_goes_on(job, whole)


def test_a_time_limit(job, whole):
    """Seconds for a run that takes longer, which is stopped at a place of its own choice."""
    code, said = job.run(train__stop_after=0.5 / 60)
    assert code == 75, said
    assert "to go on: clora distill" in said
    assert_all_whole(job.output)
    assert_goes_on(job, whole)
