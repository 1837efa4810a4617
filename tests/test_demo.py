"""``clora demo`` from the shipped studio to the report, with two updates and one held-out scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from clora import demo
from clora.errors import CloraError
from clora.studio import build
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config

ROWS = {"teachers_80", "teachers_8", "merge_svd", "merge_ties_svd", "merge_dare_ties_svd", "base", "clora"}
COLUMNS = {
    "method",
    "precomputed",
    "files",
    "megabytes",
    "nfe",
    "effect_accuracy",
    "bad_case_rate",
    "psnr",
    "subject_alignment",
    "general_accuracy",
    "per_effect",
}


@pytest.fixture
def short(monkeypatch):
    """Two updates instead of minutes, one held-out scene and two general edits."""

    def config(names, seed, minutes=1.0):
        whole = demo_config(names, seed, minutes)
        train = whole.train.model_copy(update={"updates": 2, "anchor_share": 0.5, "minutes": None})
        return whole.model_copy(update={"train": train})

    monkeypatch.setattr(demo, "demo_config", config)
    monkeypatch.setattr(build, "EVALUATION_SCENES", 1)
    monkeypatch.setattr(build, "EVALUATION_GENERAL", 2)


@pytest.mark.slow
def test_the_demo_writes_everything_it_promises(short, tmp_path):
    report = demo.run_demo(tmp_path / "out", 3, None, full=False, device="cpu")
    assert {p.name for p in report.parent.iterdir()} == {"report.html", "grid.png", "metrics.json", "collection"}
    metrics = json.loads((report.parent / "metrics.json").read_text())
    assert (metrics["seed"], metrics["device"], metrics["effects"]) == (3, "cpu", list(DEFAULT_EFFECTS))
    assert {"load", "targets", "train", "export", "evaluate"} <= metrics["seconds"].keys()
    assert 0 < metrics["peak_rss_mb"] < 6000
    rows = {row["method"]: row for row in metrics["rows"]}
    assert rows.keys() == ROWS
    assert all(row.keys() >= COLUMNS and row["per_effect"].keys() == set(DEFAULT_EFFECTS) for row in rows.values())
    assert {name for name, row in rows.items() if not row["precomputed"]} == {"clora"}
    assert rows["clora"]["files"] == 1
    assert np.asarray(Image.open(report.parent / "grid.png")).std() > 10
    assert 'src="http' not in report.read_text("utf-8"), "the report must open offline"


def test_an_unknown_effect_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(CloraError, match=r"unknown effect 'sno'.*snow"):
        demo.run_demo(tmp_path / "out", 0, ["sno"], full=False)
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloraError, match="is a file"):
        demo.run_demo(tmp_path / "file", 0, None, full=False)
