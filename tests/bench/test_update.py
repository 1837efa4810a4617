"""The benchmark of an update on a CPU, with a worker that makes none."""

from __future__ import annotations

import json
import os

import pytest

from bench import update
from clora.errors import CloraError

WORKER = """
import json, sys
seconds, peak = map(float, sys.argv[1:])
for turn in range(100):
    print("a line of a library")
    print(json.dumps({"seconds": seconds * (turn or 50), "losses": {"anchor": turn}, "peak_mib": peak}), flush=True)
    if not sys.stdin.readline():
        break
"""


def test_sides_take_turns_and_the_first_update_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "WORKER", tmp_path / "worker.py")
    update.WORKER.write_text(WORKER)
    sides = {"base": (tmp_path, ["2", "100"]), "ours": (tmp_path, ["1", "150"])}
    found = update.in_turns(sides, 3)
    assert found["base"]["rounds"] == [2, 4, 6]
    assert (found["ours"]["seconds"], found["ours"]["ratio"], found["ours"]["memory"]) == (2, 0.5, 1.5)
    assert found["ours"]["first_losses"] == {"anchor": 0}


def test_a_side_that_ends_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "WORKER", tmp_path / "worker.py")
    update.WORKER.write_text("raise SystemExit(3)")
    with pytest.raises(CloraError, match="has ended there with 3"):
        update.in_turns({"base": (tmp_path, [])}, 1)


KILLED = """
import os, signal, sys
from pathlib import Path
Path(sys.argv[1]).write_text(str(os.getpid()))
print("{}", flush=True)
sys.stdin.readline()
if sys.argv[1] == "bad":
    os.kill(os.getpid(), signal.SIGKILL)
print("{}", flush=True)
sys.stdin.readline()
"""


def test_a_side_that_is_killed_is_one_error_and_the_others_end(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "WORKER", tmp_path / "worker.py")
    update.WORKER.write_text(KILLED)
    with pytest.raises(CloraError, match=rf"expected updates from {tmp_path}, found .* with -9; mend"):
        update.in_turns({name: (tmp_path, [name]) for name in ("good", "bad", "last")}, 3)
    for name in ("good", "bad", "last"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_each_part_keeps_the_conditions_of_its_own_measurement(tmp_path, monkeypatch, capsys):
    entry = {"seconds": 1.0, "ratio": 1.0, "peak_mib": 2.0}
    monkeypatch.setattr(update, "in_turns", lambda sides, rounds: dict.fromkeys(sides, entry))
    file = tmp_path / "cpu" / "update.json"
    (tmp_path / "clora").mkdir()
    (tmp_path / "clora" / "__init__.py").touch()
    for commit, options in (("a", []), ("b", ["--against", str(tmp_path)])):
        monkeypatch.setattr(update.machine, "commit", lambda *root, commit=commit: commit)
        assert update.main(["--out", str(file.parent), *options]) == 0
    conditions = json.loads(file.read_text())["conditions"]
    assert {part: own["commit"] for part, own in conditions.items()} == {"rows": "a", "anchoring": "b", "matching": "b"}
    assert "rows: three copies: 1.000 s, 1.00; 2 MiB" in capsys.readouterr().out
