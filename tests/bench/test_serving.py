"""The benchmark of serving: the stream, the server's clock, the batches of each way, and their pictures."""

from __future__ import annotations

import json

import pytest
import torch

from bench import serving
from bench.serving import HALF_GREY, WAYS, Mixed, Request, Studio, Switched, check, main, serve, stream

CPU = torch.device("cpu")


class Clocked:
    """A way whose batch of any size takes two seconds, on a clock of its own."""

    seconds = 0.0

    def __init__(self, limit):
        self.limit, self.batches = limit, []

    def pick(self, waiting):
        return list(waiting[: self.limit])

    def render(self, batch):
        self.batches.append([request.seed for request in batch])
        self.seconds += 2.0

    def now(self):
        return self.seconds


def test_all_requests_at_once():
    requests = stream(["a", "b", "c"], 50, None)
    assert {request.arrival for request in requests} == {0.0}
    assert {request.lora for request in requests} == {"a", "b", "c"}
    assert requests == stream(["a", "b", "c"], 50, None)


def test_a_poisson_stream_has_its_rate():
    requests = stream(["a"], 2000, 4.0)
    gaps = torch.tensor([request.arrival for request in requests]).diff()
    assert gaps.min() > 0
    assert 0.25 * 0.9 < gaps.mean() < 0.25 * 1.1
    assert 0.9 < gaps.std() / gaps.mean() < 1.1  # as of exponential gaps


def test_a_latency_counts_from_the_arrival_to_the_end_of_the_batch():
    way = Clocked(limit=2)
    served = serve([Request(float(i), "a", i) for i in (0, 1, 1.5, 10)], way, way.now)
    # The first by itself, until 2; the two that came meanwhile, until 4; nothing until 10.
    assert way.batches == [[0], [1, 1.5], [10]]
    assert served.latencies == [2.0, 3.0, 2.5, 2.0]
    assert served.seconds == 12.0
    assert served.figures()["images_per_s"] == pytest.approx(4 / 12)


def test_a_stream_ends_with_the_time():
    way, times = Clocked(limit=2), iter([3.0, 1.0, -1.0])
    assert serve([Request(0.0, "a", i) for i in range(9)], way, way.now, lambda: next(times)) is None
    assert len(way.batches) == 2


def test_a_switched_batch_is_of_the_oldest_requests_lora():
    requests = [Request(0.0, "ab"[i % 2], i) for i in range(30)]
    batch = Switched.pick(None, requests)
    assert [request.seed for request in batch] == list(range(0, 16, 2))
    assert [request.seed for request in Mixed.pick(None, requests)] == list(range(8))


@pytest.fixture(scope="module")
def ways():
    """All ways, on five LoRAs, of which the fourth changes attention only."""
    return {name: make(Studio(CPU, 5)) for name, make in WAYS.items()}


REQUESTS = [Request(0.0, f"lora_{i}", i) for i in (0, 3, 3)]


def test_all_ways_make_the_same_pictures(ways):
    for _ in range(2):  # what was merged is unmerged again
        assert max(check(ways, REQUESTS).values()) < HALF_GREY


def test_pictures_of_another_lora_are_noticed(ways, monkeypatch):
    route = ways["attach"].bank.route
    monkeypatch.setattr(ways["attach"].bank, "route", lambda names: route(["lora_1"] * len(names)))
    with pytest.raises(ValueError, match="pictures differ.*attach"):
        check(ways, REQUESTS)


def test_the_whole_command_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serving.machine, "tree", lambda: "t1")
    monkeypatch.setattr(serving, "STEPS", 1)
    options = ["--device", "cpu", "--out", str(tmp_path), "--adapters", "1", "--requests", "3"]
    assert main(options) == 0
    record = json.loads((tmp_path / "cpu" / "serving-1.json").read_text())
    assert len(record["served"]) == 8  # four ways, two kinds of arrivals
    shown = capsys.readouterr()
    assert "| set_adapters |" in shown.out
    assert "serving-1: 8 of 8 streams, fuse_lora per request, poisson" in shown.err
    del record["served"][-1]
    (tmp_path / "cpu" / "serving-1.json").write_text(json.dumps(record))
    assert main(options) == 0
    again = json.loads((tmp_path / "cpu" / "serving-1.json").read_text())
    assert again["served"][:-1] == record["served"]
    assert len(again["served"]) == 8


def test_other_numbers_of_loras_do_not_go_where_results_are_committed(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--adapters", "8", "51"])
    assert "found --adapters with another value; add --out FOLDER" in capsys.readouterr().err
