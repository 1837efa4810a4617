"""The build's bookkeeping, and one pass through everything that is precomputed, with two teachers and one scene."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clora import demo
from clora.errors import CloraError
from clora.studio import assets, baselines, build, teachers
from clora.studio.demo_config import demo_config

NAMES = ["sepia", "snow"]


@pytest.fixture
def stages(monkeypatch):
    """Three stages that write one file each; the runs are counted."""
    runs = []

    def make(name):
        def stage(folder):
            runs.append(name)
            (folder / name).write_text(f"{name} {len(runs)}")
            return {"number": 1.5}, [name]

        return stage

    monkeypatch.setattr(build, "STAGES", {name: make(name) for name in ("a", "b", "c")})
    monkeypatch.setattr(build, "NEEDS", {"a": (), "b": ("a",), "c": ()})
    return runs


def test_done_stages_are_passed_over_until_a_file_or_an_input_changes(stages, tmp_path):
    build.build(tmp_path)
    build.build(tmp_path)
    assert stages == ["a", "b", "c"]
    (tmp_path / "c").write_text("spoilt")
    build.build(tmp_path)
    assert stages[3:] == ["c"]
    build.build(tmp_path, ["a"])
    assert stages[4:] == ["a"]
    build.build(tmp_path)
    assert stages[5:] == ["b"], "b was made from the old a"
    recorded = assets.provenance(tmp_path)["b"]
    assert recorded["measured"] == {"number": 1.5}
    assert recorded["inputs"] == {"a": assets.sha256(tmp_path / "a")}
    assert assets.verified(tmp_path, "b") == tmp_path / "b"
    (tmp_path / "b").write_text("spoilt")
    with pytest.raises(CloraError, match="b is missing or not the file"):
        assets.verified(tmp_path, "b")


def test_a_stage_made_anew_takes_those_after_it_along(stages, tmp_path):
    build.build(tmp_path)
    (tmp_path / "a").write_text("spoilt")
    build.build(tmp_path)
    assert stages[3:] == ["a", "b"]
    assert all(build._is_done(tmp_path, name) for name in build.STAGES)


def test_a_stage_without_what_it_needs_is_refused(stages, tmp_path):
    with pytest.raises(CloraError, match=r"stage 'b' needs \['a'\] first.*--stages a"):
        build.build(tmp_path, ["b"])
    assert stages == []


def test_the_shipped_stages_belong_together():
    """None was made from files that have changed since."""
    folder = assets.assets_folder()
    assert [name for name in build.STAGES if not build._is_done(folder, name)] == []
    assert assets.load_targets(folder).effects == tuple(sorted(spec.effect for spec in teachers.SPECS))


def test_an_unknown_stage_names_the_nearest(tmp_path):
    with pytest.raises(CloraError, match=r"unknown stage 'bases'.*'base'"):
        build.build(tmp_path, ["bases"])


@pytest.mark.slow
def test_what_is_precomputed_can_be_computed(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "EVALUATION_SCENES", 1)
    monkeypatch.setattr(build, "EVALUATION_GENERAL", 2)
    monkeypatch.setattr(build, "TARGET_SOURCES", 2)
    monkeypatch.setattr(baselines, "TEACHER_STEPS", 2)
    adapter = build.studio(assets.assets_folder())
    loras = teachers.load_teachers(adapter, assets.assets_folder() / "teachers", NAMES)
    run = demo.Run(tmp_path, demo_config(NAMES, 0))
    rows = demo.measured_rows(run, adapter, loras)
    assert list(rows) == ["teachers_80", "teachers_8", *baselines.MERGES, "base"]
    for row in rows.values():
        assert set(row["verdicts"]) == set(NAMES)
        assert all(len(verdicts) == 1 for verdicts in row["verdicts"].values())
        assert all(image.shape == (64, 64, 3) for image in row["images"].values())
    assert all(rows[name]["megabytes"] > 0.1 for name in baselines.MERGES)
    different = np.abs(rows["teachers_80"]["images"]["snow"].astype(int) - rows["base"]["images"]["snow"])
    assert different.mean() > 1, "the teacher must do something"
    assert torch.isfinite(build.target_sources(adapter)).all()
