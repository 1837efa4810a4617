"""Runs that are stopped by signals and time limits, and two runs at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clora.collection.write import LORA_FILE
from clora.commands.distill import CACHE, CHECKPOINT, distill
from clora.data import rendering
from clora.errors import CloraError
from clora.locks import locked
from clora.stopping import Stopped
from clora.training.trainer import DistillTrainer

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def weights(folder):
    return load_file(folder / LORA_FILE)


@pytest.fixture
def config(make_config):
    return make_config(train={"updates": 3})


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_the_update_and_loses_nothing(config, monkeypatch, capsys, tmp_path, number):
    iterate = DistillTrainer._iterate

    def signalled(trainer, progress):
        if trainer.update == 1:
            os.kill(os.getpid(), number)
        return iterate(trainer, progress)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "_iterate", signalled)
        with pytest.raises((KeyboardInterrupt, Stopped)) as raised:
            distill(config)
    assert raised.type is KeyboardInterrupt or raised.value.code == CODES[number]
    assert "the same command goes on from update 2" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out" / CHECKPOINT).iterdir()] == ["00000002.safetensors"]
    resumed = weights(distill(config))
    assert "resuming at update 2" in capsys.readouterr().err
    whole = weights(distill(config.model_copy(update={"output": str(tmp_path / "whole")})))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("moment", ["_iterate", "_progress"])
def test_a_signal_in_the_last_update_stops_the_run_which_is_then_completed(
    config, monkeypatch, capsys, tmp_path, number, moment
):
    """The training is over; its export waits for the next run, as the exit code says."""
    method = getattr(DistillTrainer, moment)

    def signalled(trainer, *progress):
        # The progress is looked at once more after the last update.
        if trainer.update == (2 if moment == "_iterate" else 3):
            os.kill(os.getpid(), number)
        return method(trainer, *progress)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, moment, signalled)
        with pytest.raises((KeyboardInterrupt, Stopped)) as raised:
            distill(config)
    assert raised.type is KeyboardInterrupt or raised.value.code == CODES[number]
    assert "the same command goes on from update 3" in capsys.readouterr().err
    assert not (tmp_path / "out" / LORA_FILE).exists()
    monkeypatch.setattr(DistillTrainer, "_iterate", None)
    distill(config)
    assert weights(tmp_path / "out")


def test_a_signal_stops_rendering_at_once_and_keeps_what_is_rendered(config, monkeypatch, capsys, tmp_path):
    render = rendering.render_targets

    def signalled(*arguments):
        for i, picture in enumerate(render(*arguments)):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield picture

    monkeypatch.setattr(rendering, "render_targets", signalled)
    with pytest.raises(Stopped) as raised:
        distill(config)
    assert raised.value.code == 143
    assert "what was encoded and rendered is kept" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / CACHE / "targets").iterdir())) == 1


def test_the_time_limit_stops_with_a_checkpoint(make_config, capsys, tmp_path):
    with pytest.raises(Stopped) as raised:
        distill(make_config(train={"updates": 10**6, "stop_after": 2 / 60}))
    assert raised.value.code == 75
    assert "the same command goes on from update" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / CHECKPOINT).iterdir())) == 1


def test_a_second_run_in_the_same_folder_is_refused(config, tmp_path):
    with locked(tmp_path / "out"), pytest.raises(CloraError, match="in use by another run"):
        distill(config)


@pytest.fixture
def command(config, tmp_path):
    """Starts the command on a config of this name, with settings replaced."""
    tree, started = config.model_dump(mode="json"), []

    def start(name, **settings):
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree | {"output": str(tmp_path / name)}))
        changes = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        process = subprocess.Popen(
            [sys.executable, "-m", "clora", "distill", file, *changes],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(found, process):
    for _ in range(600):
        if found():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail("nothing was found in a minute")


@pytest.mark.slow
def test_the_command_exits_as_scripts_expect_and_names_the_way_on(command, tmp_path):
    """As a process of its own, whose handler of Ctrl-C is Python's; other signals and places: `faults/test_signals.py`."""
    process = command("out", train__updates=10**6, train__checkpoint_every=1)
    wait_for((tmp_path / "out" / CHECKPOINT / "00000002.safetensors").exists, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == CODES[signal.SIGINT], said
    assert "the same command goes on from update" in said
    assert f"to go on: clora distill {tmp_path / 'out.yaml'} train.updates=1000000" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_runs_share_a_cache(command, tmp_path):
    """Both render and write the same entries at the same time, and make the same collection."""
    runs = [command(name, data__cache=tmp_path / "kept") for name in ("one", "two")]
    for run in runs:
        said = run.communicate(timeout=120)[1]
        assert run.returncode == 0, said
        assert "damaged" not in said
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not list((tmp_path / "kept").rglob("*.tmp"))
