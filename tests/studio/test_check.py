"""``clora studio check``: every measured number stands against its floor."""

import pytest

from clora.errors import CloraError
from clora.studio import check
from clora.studio.assets import ASSETS
from clora.studio.evaluation import GENERAL_FAMILIES
from clora.studio.quality import TeacherQuality


@pytest.fixture
def measured(monkeypatch):
    """What the measures find, without measuring."""
    values = {
        "vae": {"vae_psnr_64": 33.0, "vae_psnr_128": 35.0},
        "judges": {"judge_auroc": 0.999},
        "base": {"general_accuracy": 0.95, "psnr": dict.fromkeys(GENERAL_FAMILIES, 30.0)},
        "teachers": {"thermal": TeacherQuality(0.95, 26.0, 27.0), "snow": TeacherQuality(0.95)},
    }
    monkeypatch.setattr(check, "measure_judges", lambda *_: (values["judges"], ["judge: described"]))
    monkeypatch.setattr(check.quality, "vae_quality", lambda vae: values["vae"])
    monkeypatch.setattr(check.quality, "base_quality", lambda adapter: values["base"])
    monkeypatch.setattr(check.quality, "teacher_quality", lambda adapter, loras: values["teachers"])
    monkeypatch.setattr(check, "load_teachers", lambda *_: {})
    return values


def test_a_studio_above_its_floors_passes(measured, capsys):
    check.check(ASSETS, "cpu")
    shown = capsys.readouterr()
    for word in ("base_general_accuracy_128", "thermal", "judge_auroc"):
        assert word in shown.out
    assert "second_opinion_auroc" not in shown.out
    assert "judge: described" in shown.out + shown.err


@pytest.mark.parametrize(
    ("part", "change", "names"),
    [
        ("vae", {"vae_psnr_64": 29.9}, ["vae_psnr_64"]),
        ("judges", {"judge_auroc": float("nan")}, ["judge_auroc"]),
        ("judges", {"second_opinion_auroc": 0.98}, ["second_opinion_auroc"]),
        ("base", {"general_accuracy": 0.91}, ["base_general_accuracy_64", "base_general_accuracy_128"]),
        ("base", {"psnr": {"warm": 27.0, "blur": 30.0}}, ["base_colour_psnr_64", "base_colour_psnr_128"]),
        ("base", {"psnr": {"warm": 30.0, "blur": 21.0}}, ["base_spatial_psnr_64", "base_spatial_psnr_128"]),
        ("teachers", {"snow": TeacherQuality(0.8)}, ["teacher snow"]),
        ("teachers", {"thermal": TeacherQuality(0.95, 22.0, 27.0)}, ["teacher thermal"]),
    ],
)
def test_what_is_below_its_floor_is_named(measured, part, change, names):
    measured[part].update(change)
    with pytest.raises(CloraError, match=f"below the floor: {', '.join(names)}; "):
        check.check(ASSETS, "cpu")
