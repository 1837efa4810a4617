"""The report: three whole files, readable offline, with nothing from the input taken as markup."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from clora.data.images import encode_png
from clora.errors import CloraError
from clora.studio.demo_report import Shown, write_report
from clora.studio.pixels import to_bytes

EFFECTS = ["snow", "a<b>&c"]
COLUMNS = ("source", "teacher, 80 passes", "clora")


def row(method, accuracy, psnr=20.0, precomputed=True):
    return {
        "method": method,
        "precomputed": precomputed,
        "files": 1,
        "megabytes": 1.5,
        "nfe": 8,
        "effect_accuracy": accuracy,
        "bad_case_rate": 1 - accuracy,
        "bad_case_rate_stochastic": 1 - accuracy,
        "psnr": psnr,
        "subject_alignment": 4.0,
        "general_accuracy": np.float32(0.5),
        "per_effect": {"snow": accuracy},
    }


@pytest.fixture(scope="module")
def metrics():
    rows = [row("teachers_80", 0.96), row("merge_svd", 0.3), row("base", 0.0, float("nan")), row("clora", 0.9, 21.0)]
    rows[-1]["precomputed"] = False
    seconds = {"distil": 3.0}
    return {
        "seed": 1,
        "device": "cpu",
        "threads": 1,
        "dtype": "float32",
        "updates": 496,
        "targets_precomputed": True,
        "seconds": seconds,
        "peak_memory_gb": 9.0,
        "effects": EFFECTS,
        "rows": rows,
    }


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((2, 3, 16, 16, 3))


def gallery(images):
    pixels = to_bytes(images)
    return [Shown(name, f"make it <{name}>", pixels[i, 0], pixels[i, 2]) for i, name in enumerate(EFFECTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, metrics, images):
    folder = tmp_path_factory.mktemp("report") / "new"
    curve = [(i, float(i)) for i in range(50)]
    curves = {"dmd_bs": [*curve, (50, float("nan"))], "empty": []}
    assert write_report(folder, metrics, gallery(images), COLUMNS, images, curves).is_file()
    return folder


def test_only_the_three_files(folder):
    assert sorted(file.name for file in folder.iterdir()) == ["grid.png", "metrics.json", "report.html"]


def test_metrics_are_valid_json(folder):
    found = json.loads((folder / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    by_method = {entry["method"]: entry for entry in found["rows"]}
    assert by_method["base"]["psnr"] is None
    assert by_method["clora"]["general_accuracy"] == 0.5
    assert found["updates"] == 496
    assert list(found)[5:] == ["targets_precomputed", "seconds", "peak_memory_gb", "effects", "rows"]


def test_page_is_self_contained(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert page.count("<img") == 2 * 2 + 2 * 3  # before and after, and pictures
    assert page.count("<svg") == 1  # the one curve with points
    assert "a&lt;b&gt;&amp;c" in page
    assert "a<b>" not in page
    assert "on cpu (1 thread) in float32, 496 updates." in page
    assert page.count("<th") == page.count("</th>") + page.count("<thead")
    assert "prefers-color-scheme: dark" in page


def test_table(folder):
    page = (folder / "report.html").read_text()
    assert page.count('<span class="tag">precomputed</span>') == 3
    assert "one LoRA each, 80 passes" in page
    assert "clora: one LoRA, 8 passes" in page
    assert '<td class="best">96.0 %</td>' in page  # accuracy: high is good
    assert '<td class="best">4.0 %</td>' in page  # bad cases: low is good
    assert '<td class="best">21.0 dB</td>' in page
    assert page.count('<td class="best">50.0 %</td>') == 4  # a tie is bold everywhere


def test_intervals_and_differences_are_shown(tmp_path, metrics, images):
    rows = [{**row, "intervals": {"effect_accuracy": [0.91, 0.98]}} for row in metrics["rows"]]
    difference = {"effect_accuracy": {"mean": -0.02, "interval": [-0.04, 0.01]}}
    found = {**metrics, "rows": rows, "against_teachers": difference}
    page = write_report(tmp_path, found, gallery(images), COLUMNS, images, {}).read_text()
    assert page.count("<small>91.0 % to 98.0 %</small>") == len(rows)
    assert "effect accuracy -2.0 % (-4.0 % to 1.0 %)." in page


def test_the_first_pictures_are_before_and_after(folder):
    page = (folder / "report.html").read_text()
    first = page[page.index('class="gallery"') : page.index('class="figures"')]
    assert first.count("<span>source</span><span>clora</span>") == 2
    assert "make it &lt;snow&gt;" in first


def test_grid_is_enlarged(folder):
    image = np.asarray(Image.open(folder / "grid.png"))
    assert image.shape[0] > 2 * 192
    assert image.shape[1] > 3 * 192


def test_png_shows_the_pixels(images):
    pixels = to_bytes(images)[0, 0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(pixels)))), pixels)


def test_wrong_grid_shape(tmp_path, metrics):
    with pytest.raises(ValueError, match=r"expected images \[2, 3, H, W, 3\]"):
        write_report(tmp_path, metrics, [], COLUMNS, np.zeros((3, 2, 4, 4, 3)), {})
    assert not list(tmp_path.iterdir())


def test_unwritable(tmp_path, metrics, images):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloraError, match="cannot be written"):
        write_report(tmp_path / "file", metrics, [], COLUMNS, images, {})
