"""The folder of photographs out of packages, tried with small packages."""

import io
import json
import zipfile

import numpy as np
import pytest
from helpers.packages import deb, picture, rcc
from PIL import Image

from clora.errors import CloraError
from clora.studio.making import photographs as making
from clora.studio.making.packages import read_package, read_rcc
from clora.studio.photographs import PHOTOGRAPHS, TABLE, Row, load_photographs, read_table

WIDE = Row(
    "backgrounds/wide.webp", "background", "", "train", "PD", "", "", "gcompris-qt-data", "share/a.rcc/x/wide.png"
)
SMALL = Row("backgrounds/small.webp", "background", "", "held_out", "PD", "", "", "scikit-image", "data/small.png")
DOG = Row("cutouts/dog.webp", "cutout", "dog", "train", "PD", "", "", "gcompris-qt-data", "share/a.rcc/x/dog.png")
CAT = Row("cutouts/cat.webp", "cutout", "cat", "train", "PD", "", "", "gcompris-qt-data", "share/cat.png")


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The folder of packages, the table of their pictures, and an outline of the cat."""
    files = {"x/wide.png": picture((1000, 300)), "x/dog.png": picture((400, 200), "RGBA")}
    archive = rcc(files, compressed=["x/dog.png"])
    content = deb({"share/a.rcc": archive, "share/cat.png": picture((100, 80)), "share/unused": b"1"})
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "gcompris-qt-data_3.1-2_all.deb").write_bytes(content)
    with zipfile.ZipFile(folder / "scikit_image-0.26.0-any.whl", "w") as wheel:
        wheel.writestr("data/small.png", picture((60, 50)))
    (tmp_path / "table.csv").write_text(making.table_text([WIDE, SMALL, DOG, CAT]), "utf-8")
    (tmp_path / "outlines.json").write_text(json.dumps({CAT.file: [[[250, 250], [750, 250], [750, 750]]]}))
    monkeypatch.setattr(making, "OUTLINES", tmp_path / "outlines.json")
    return folder


def test_packages_become_a_folder_that_the_reader_takes(packages, tmp_path):
    out = tmp_path / "out"
    making.make_photographs(packages, out, tmp_path / "table.csv")
    made = load_photographs(out)
    assert made.rows == (WIDE, SMALL, DOG, CAT)
    assert [image.shape for image in made.backgrounds("train")] == [(288, 576, 3)]
    assert [image.shape for image in made.backgrounds("held_out")] == [(50, 60, 3)]
    dog, cat = made.cutouts("train")
    assert dog.image.shape == (72, 144, 4)
    np.testing.assert_allclose(cat.image.shape, (40, 50, 4), atol=1)
    assert cat.image[5, 40, 3] == 255
    assert cat.image[35, 10, 3] == 0
    assert "`cutouts/cat.webp`" in (out / "ATTRIBUTION.md").read_text("utf-8")


def test_the_command_names_a_missing_package(packages, tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: expected one file lomiri-wallpapers-16\.04_\S+ in .* found 0; get it by"
    ):
        making.main(["--packages", str(packages), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_cutout_needs_an_outline_or_transparent_parts(packages, tmp_path, monkeypatch):
    (tmp_path / "outlines.json").write_text("{}")
    with pytest.raises(CloraError, match=r"cutouts/cat\.webp: expected an outline"):
        making.make_photographs(packages, tmp_path / "out", tmp_path / "table.csv")


def test_a_hole_in_an_outline_is_transparent():
    image = Image.new("RGB", (100, 100), "red")
    square = [(0, 0), (1000, 0), (1000, 1000), (0, 1000)]
    hole = [(400, 400), (600, 400), (600, 600), (400, 600)]
    opacity = np.asarray(making.cut_along(image, [square, hole]).getchannel("A"))
    assert opacity[50, 50] == 0
    assert opacity[10, 10] == opacity[90, 50] == 255


def test_a_cutout_is_trimmed_without_a_fringe():
    """The colour of transparent pixels does not show where the picture is shrunk."""
    pixels = np.zeros((600, 400, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[100:500, 100:300] = (255, 0, 0, 255)
    shrunk = np.asarray(making.shrink_cutout(Image.fromarray(pixels)))
    assert shrunk.shape == (144, 72, 4)
    assert shrunk[shrunk[..., 3] > 0][:, 1].max() <= 2


@pytest.mark.parametrize("compression", ["xz", "gz"])
def test_a_debian_package_is_read_without_its_tools(tmp_path, compression):
    package = tmp_path / "p.deb"
    package.write_bytes(deb({"a/b": b"content", "c": b""}, compression))
    assert read_package(package, ["a/b", "c"]) == {"a/b": b"content", "c": b""}


@pytest.mark.parametrize("version", [1, 2, 3])
def test_qt_archives_of_each_version_are_read(version):
    files = {"a/x": b"one", "a/y": b"two" * 100, "b/ä": b""}
    assert read_rcc(rcc(files, version, compressed=["a/y"])) == files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a Debian package"),
        (b"!<arch>\n", r"no data\.tar"),
        (deb({})[:-80], "cannot be read"),
        (deb({"share/a.rcc": b"qres"}), "cannot be read"),
        (deb({"share/a.rcc": b"none"}), "not a Qt resource archive"),
        (deb({"share/a.rcc": rcc({"x/y": b""})}), r"expected 'share/a\.rcc/x/dog\.png'"),
        (deb({"other": b""}), r"expected 'share/a\.rcc/x/dog\.png'"),
    ],
)
def test_a_package_that_does_not_hold_the_picture_is_named(tmp_path, content, message):
    package = tmp_path / "p.deb"
    package.write_bytes(content)
    with pytest.raises(CloraError, match=message):
        read_package(package, [DOG.path])


def test_what_is_no_picture_is_named():
    with pytest.raises(CloraError, match=r"x/dog\.png in gcompris-qt-data cannot be read"):
        making.make_picture(b"GIF89a", DOG, None)


def test_the_shipped_table_and_outlines_fit_each_other():
    rows = read_table(PHOTOGRAPHS / TABLE)
    assert (PHOTOGRAPHS / TABLE).read_bytes() == making.table_text(rows).encode()
    assert {row.package for row in rows} == set(making.PACKAGES)
    outlined = {row.file for row in rows if "cut out along an outline" in row.changes}
    assert set(json.loads(making.OUTLINES.read_text("utf-8"))) == outlined
    with Image.open(io.BytesIO((PHOTOGRAPHS / min(outlined)).read_bytes())) as image:
        assert image.format == "WEBP"
