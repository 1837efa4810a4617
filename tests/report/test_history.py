"""The numbers of a run: means of some updates a line, which outlive a stop, and the page that shows them."""

from __future__ import annotations

import itertools
import json
import math
from types import SimpleNamespace

import pytest

from clora.errors import CloraError
from clora.report.history import HISTORY, History, read_history
from clora.report.run_report import write_run_report


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A second passes from each reading to the next."""
    monkeypatch.setattr("clora.report.history.time", SimpleNamespace(monotonic=itertools.count().__next__))


def train(folder, updates, first=0, anchoring=12):
    history = History(folder / HISTORY, first, every=5)
    for update in range(first + 1, updates + 1):
        values = {"loss": float(update), "anchor": math.nan if update == 3 else 1.0}
        history.add(update, "anchoring" if update <= anchoring else "matching", values)
    history.flush()
    return read_history(folder / HISTORY)


def test_records_are_means_and_end_with_their_phase(tmp_path):
    records = train(tmp_path, 22)
    assert [record.update for record in records] == [5, 10, 12, 15, 20, 22]
    assert [record.values["loss"] for record in records] == [3.0, 8.0, 11.5, 14.0, 18.0, 21.5]
    assert [record.phase for record in records] == ["anchoring"] * 3 + ["matching"] * 3
    assert records[0].values["anchor"] == 1.0  # of the four that are finite
    seconds = [record.seconds for record in records]
    assert seconds == [1, 2, 3, 4, 5, 6]


def test_a_run_that_goes_on_measures_again_what_it_makes_again(tmp_path):
    whole = train(tmp_path, 22)
    file = tmp_path / HISTORY
    file.write_text(file.read_text().replace("14.0", "99.0") + '{"update": 30, "se')  # a machine was lost here
    again = train(tmp_path, 22, first=12)
    assert [record._replace(seconds=0) for record in again] == [record._replace(seconds=0) for record in whole]
    assert [record.update for record in train(tmp_path, 5)] == [5], "a run that begins anew keeps nothing"


def test_a_file_that_is_no_history_is_refused(tmp_path):
    (tmp_path / HISTORY).write_text('{"update": 1}\n{"update": 2}\n')
    with pytest.raises(CloraError, match="line 1: expected a record of a run"):
        read_history(tmp_path / HISTORY)
    with pytest.raises(CloraError, match="expected the folder of a run with a history.jsonl"):
        write_run_report(tmp_path / "nowhere")


def test_the_page_shows_what_was_measured(tmp_path):
    train(tmp_path, 22)
    page = write_run_report(tmp_path)
    text = page.read_text()
    assert page == tmp_path / "report.html"
    assert text.count("<svg") == 3  # loss, anchor and speed
    assert "updates per second" in text
    assert "<b>22</b><span>updates" in text
    for words in ("anchoring", "matching", "What the student's update minimises"):
        assert words in text.replace("&#39;", "'")
    assert "http" not in text
    assert all(json.loads(line)["values"] for line in (tmp_path / HISTORY).read_text().splitlines())
