"""A run's numbers reach the tracker that accelerate has under a name; one that is missing is refused before any work."""

from __future__ import annotations

import pytest
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType

from clora.commands.distill import distill
from clora.commands.tracking import find_tracker, tracked
from clora.errors import CloraError
from clora.report.history import HISTORY, read_history


class Recorder(accelerate_tracking.GeneralTracker):
    """A tracker that keeps what it gets."""

    name = "trackio"
    requires_logging_directory = False
    made: list[Recorder] = []

    def __init__(self, run_name):
        super().__init__()
        self.run_name, self.logged, self.is_finished = run_name, {}, False
        Recorder.made.append(self)

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None):
        self.logged[step] = values

    def finish(self):
        self.is_finished = True


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [LoggerType.TRACKIO])
    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    Recorder.made = []
    return Recorder


def test_a_run_logs_its_records_and_settings(recorder, make_config, tmp_path):
    distill(make_config(train={"updates": 12, "tracker": "trackio"}))
    (made,) = recorder.made
    records = read_history(tmp_path / "out" / HISTORY)
    assert list(made.logged) == [record.update for record in records] == [10, 12]
    assert made.logged[12]["loss"] == pytest.approx(records[-1].values["loss"], rel=1e-4)
    assert made.run_name == "out"
    assert made.settings["train.updates"] == 12
    assert {type(value) for value in made.settings.values()} <= {str, int, float, bool}
    assert made.is_finished


def test_a_run_that_fails_ends_its_tracker(recorder, tmp_path):
    with pytest.raises(KeyError), tracked("trackio", tmp_path, {}):
        raise KeyError
    assert recorder.made[0].is_finished


def test_only_trackers_that_are_there_are_taken(recorder, monkeypatch):
    assert find_tracker("trackio") == "trackio"
    assert find_tracker(None) is None
    assert find_tracker("auto") is None
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    assert find_tracker("auto") == "tensorboard"
    with pytest.raises(CloraError, match="trackio is not installed; pip install trackio"):
        find_tracker("trackio")
    with pytest.raises(CloraError, match=r"found 'wandbb'.*'wandb'"):
        find_tracker("wandbb")


def test_a_tracker_that_is_missing_is_refused_before_anything_is_loaded(recorder, make_config, monkeypatch, tmp_path):
    monkeypatch.setattr("clora.commands.distill.load_adapter", None)
    with pytest.raises(CloraError, match="train.tracker: wandb is not installed"):
        distill(make_config(train={"tracker": "wandb"}))
    assert not (tmp_path / "out").exists()
