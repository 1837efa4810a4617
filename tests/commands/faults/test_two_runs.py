"""Two runs at once: on one output the second is refused, on one cache both end as they would on their own."""

from __future__ import annotations

import os
import random
import signal

import pytest
from helpers.fault_runs import Fault
from helpers.written import BEGINNINGS, Written

pytestmark = pytest.mark.skipif(os.name == "nt", reason="files stay open as on POSIX")


@pytest.mark.parametrize("settings", [{}, pytest.param({"seed": 3}, marks=pytest.mark.slow)], ids=["same", "other"])
def test_one_output(job, whole, settings):
    first = job.start(Fault(whole[1]["rendering"][5], waits=True))
    first.wait_for_its_place()
    code, said = job.run(**settings)
    assert code == 1
    assert f"in use by another run (process {first.process.pid} on" in said
    assert "wait until it ends, or name another output" in said
    first.go_on()
    assert first.end() == 0, first.said
    assert Written.read(job.output) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["encoding", "rendering"])
def test_one_cache(job, whole, tmp_path, phase):
    """One run waits in the middle of its writing while another makes all entries, and one is killed there."""
    cache = job.folder / "kept"
    chance = random.Random(phase)
    first = job.start(Fault(chance.choice(whole[1][phase][:10]), waits=True), "first", data__cache=cache)
    first.wait_for_its_place()
    killed = Fault(chance.randrange(8), (signal.SIGKILL,), within=BEGINNINGS[phase])
    assert job.run(killed, "second", data__cache=cache)[0] == -signal.SIGKILL
    for output in ("second", "out"):
        code, said = job.run(output=output, data__cache=cache)
        assert code == 0, said
        assert "damaged" not in said
    first.go_on()
    assert first.end() == 0, first.said
    outputs = [Written.read(job.folder / output) for output in ("first", "second", "out")]
    assert [found.files for found in outputs] == [whole[0].files] * 3
    assert job.run(output="out", data__cache=cache)[0] == 0
    assert not list(job.folder.rglob("*.tmp")), "of the run that was killed, as soon as no other uses the cache"
