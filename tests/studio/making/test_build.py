"""The build's bookkeeping, and what is recorded of the studio that ships."""

from __future__ import annotations

import pytest

from clora.errors import CloraError
from clora.hashing import file_digest
from clora.studio import assets, targets
from clora.studio.check import FLOORS, base_numbers
from clora.studio.demo_config import DEFAULT_EFFECTS
from clora.studio.making import build
from clora.studio.photographs import PHOTOGRAPHS, TABLE, load_photographs
from clora.studio.teachers import TEACHERS


@pytest.fixture
def stages(monkeypatch):
    """Three stages that write one file each; the runs are counted."""
    runs = []

    def make(name):
        def stage(folder, device, photographs):
            runs.append(name)
            (folder / name).write_text(f"{name} {len(runs)}")
            return {"number": 1.5}, [name]

        return stage

    needs = {"a": (), "b": ("a",), "c": ()}
    monkeypatch.setattr(build, "STAGES", {name: build.Stage(make(name), needed) for name, needed in needs.items()})
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
    assert recorded["inputs"] == {"a": file_digest(tmp_path / "a"), TABLE: file_digest(PHOTOGRAPHS / TABLE)}
    assert assets.verified(tmp_path, "b") == tmp_path / "b"
    (tmp_path / "b").write_text("spoilt")
    with pytest.raises(CloraError, match="b is missing or not the file"):
        assets.verified(tmp_path, "b")


def test_a_stage_made_anew_takes_those_after_it_along(stages, tmp_path):
    build.build(tmp_path)
    (tmp_path / "a").write_text("spoilt")
    build.build(tmp_path)
    assert stages[3:] == ["a", "b"]
    assert all(build._is_done(tmp_path, name, load_photographs()) for name in build.STAGES)


def test_a_stage_without_what_it_needs_is_refused(stages, tmp_path):
    with pytest.raises(CloraError, match=r"stage 'b' needs \['a'\] first; name a in --stages, too"):
        build.build(tmp_path, ["b"])
    assert stages == []


def test_the_shipped_stages_belong_together():
    """None was made from files that have changed since."""
    folder, photographs = assets.ASSETS, load_photographs()
    assert [name for name in build.STAGES if not build._is_done(folder, name, photographs)] == []
    assert targets.load_targets(folder).effects.keys() == set(DEFAULT_EFFECTS)


def test_what_was_measured_of_the_shipped_studio_is_recorded():
    """For every size and every teacher; `clora studio check` compares with floors."""
    recorded = {name: entry["measured"] for name, entry in assets.provenance(assets.ASSETS).items()}
    numbers = dict(recorded["vae"])
    for size, found in recorded["base"].items():
        numbers |= base_numbers(found, int(size))
    assert {name for name in FLOORS if "auroc" not in name} == numbers.keys()
    for size in map(str, build.MEASURED):
        effects = [effect for name in build.TEACHER_STAGES for effect in recorded[name][size]]
        assert sorted(effects) == sorted(TEACHERS)


def test_a_folder_without_a_studio_is_refused(tmp_path):
    with pytest.raises(CloraError, match="found no pipeline in it"):
        assets.load_studio(tmp_path)
    (tmp_path / assets.PROVENANCE).write_text("{")
    with pytest.raises(CloraError, match="cannot be read"):
        assets.provenance(tmp_path)


def test_an_unknown_stage_names_the_nearest(tmp_path):
    with pytest.raises(CloraError, match=r"unknown stage 'bases'.*'base'"):
        build.build(tmp_path, ["bases"])
