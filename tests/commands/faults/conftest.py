"""One small job of the command line, what it writes when nothing disturbs it, and runs of it that are disturbed."""

from __future__ import annotations

import pytest
from helpers.jobs import make_job
from helpers.written import Written, phases

from clora.testing import tiny_config


@pytest.fixture(scope="session")
def tree(tiny_folder, loras, images):
    effects = [{"name": name, "lora": str(file), "prompt": f"make it {name}"} for name, file in loras.items()]
    data = {"sources": str(images), "sources_per_effect": 2, "held_out": 1}
    train = {"updates": 4, "checkpoint_every": 2}
    return tiny_config(effects, pipeline=str(tiny_folder), data=data, train=train).model_dump(mode="json")


@pytest.fixture
def job(tmp_path, tree):
    job = make_job(tmp_path, tree)
    yield job
    job.runs.close()


@pytest.fixture(scope="session")
def whole(tree, tmp_path_factory):
    """What an undisturbed run writes; ``places`` are all its places by phase."""
    job = make_job(tmp_path_factory.mktemp("whole"), tree)
    run = job.start()
    assert run.end() == 0, run.said
    return Written.read(job.output), phases(run.places), job.output
