"""The shipped photographs, and what the reader of a folder refuses."""

import csv
import re

import numpy as np
import pytest
from helpers.packages import picture

from clora.errors import CloraError
from clora.studio.making.attribution import attribution
from clora.studio.photographs import PHOTOGRAPHS, SPLITS, TABLE, Row, load_photographs, read_table

BACKGROUND = {
    "file": "a.png",
    "kind": "background",
    "noun": "",
    "split": "train",
    "licence": "PD",
    "author": "",
    "source": "",
}
CUTOUT = BACKGROUND | {"file": "b.png", "kind": "cutout", "noun": "dog", "licence": "CC-BY-SA-4.0", "author": "Me"}


def write_folder(folder, *rows):
    """A folder with the two pictures a.png (background) and b.png (cut-out) and a table."""
    (folder / "a.png").write_bytes(picture(size=(40, 30)))
    (folder / "b.png").write_bytes(picture(mode="RGBA"))
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list({name: None for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_a_folder_is_read_by_split_and_kind(tmp_path):
    photographs = load_photographs(write_folder(tmp_path, BACKGROUND, CUTOUT))
    (background,) = photographs.backgrounds("train")
    (cutout,) = photographs.cutouts("train")
    assert background.shape == (30, 40, 3)
    assert background.dtype == cutout.image.dtype == np.uint8
    assert (cutout.noun, cutout.image.shape) == ("dog", (30, 40, 4))
    assert photographs.backgrounds("held_out") == photographs.cutouts("validation") == []
    assert load_photographs(tmp_path) is photographs
    with pytest.raises(ValueError, match="read-only"):
        background[0, 0] = 0
    with pytest.raises(CloraError, match="unknown split 'test'"):
        photographs.backgrounds("test")


PHOTO = {"package": "p", "path": "x.jpg"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([BACKGROUND | {"colour": "red"}, CUTOUT], "unknown column 'colour'"),
        (
            [{k: v for k, v in row.items() if k != "author"} for row in (BACKGROUND, CUTOUT)],
            r"found none named \['author'\]",
        ),
        ([BACKGROUND | {"licence": "GPL-2"}, CUTOUT], "found 'GPL-2'"),
        ([BACKGROUND | {"licence": "CC-BY-NC-4.0"}, CUTOUT], "found 'CC-BY-NC-4.0'"),
        ([BACKGROUND, CUTOUT | {"author": ""}], "asks for the author's name"),
        ([BACKGROUND | {"split": "test"}, CUTOUT], "expected split to be one of"),
        ([BACKGROUND | {"kind": "picture"}, CUTOUT], "expected kind to be one of"),
        ([BACKGROUND, CUTOUT | {"noun": ""}], "expected a noun in lower case"),
        ([BACKGROUND, CUTOUT | {"noun": "Dog"}], "expected a noun in lower case"),
        ([BACKGROUND | {"noun": "sky"}, CUTOUT], "expected a noun in lower case"),
        ([BACKGROUND | {"file": "../a.png"}, CUTOUT], "expected a file in the table's folder"),
        ([BACKGROUND, BACKGROUND, CUTOUT], "'a.png' is listed twice"),
        ([BACKGROUND], "expected pictures of the kind 'cutout' in the split 'train'"),
        ([CUTOUT], "expected pictures of the kind 'background' in the split 'train'"),
        ([BACKGROUND | PHOTO, CUTOUT | PHOTO, CUTOUT | PHOTO | {"file": "c", "split": "held_out"}], "in two splits"),
        ([BACKGROUND | {"file": "none.png"}, CUTOUT], "none.png, which cannot be read"),
        ([BACKGROUND, CUTOUT | {"file": "a.png"}], "'a.png' is listed twice"),
        ([BACKGROUND | {"file": "b.png"}, CUTOUT | {"file": "a.png"}], "expected a cut-out with an alpha channel"),
        ([BACKGROUND | {"file": TABLE}, CUTOUT], "which cannot be read"),
    ],
)
def test_what_a_folder_may_not_hold_is_named(tmp_path, rows, message):
    with pytest.raises(CloraError, match=message):
        load_photographs(write_folder(tmp_path, *rows))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "does not exist; expected a table of photographs"),
        ("", "found none named"),
        ("file,kind,noun,split,licence,author,source\na.png,background\n", "picture 1: expected 7 values"),
        ("file,file\n", "'file' is there twice"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, table, message):
    if table is not None:
        (tmp_path / TABLE).write_text(table, "utf-8")
    with pytest.raises(CloraError, match=message):
        load_photographs(tmp_path)


def test_a_picture_that_is_cut_off_is_named(tmp_path):
    photographs = load_photographs(write_folder(tmp_path, BACKGROUND, CUTOUT))
    (tmp_path / "a.png").write_bytes(picture(size=(40, 30))[:300])
    with pytest.raises(CloraError, match=r"a\.png, which cannot be read"):
        photographs.backgrounds("train")


def test_the_shipped_photographs_are_complete():
    photographs = load_photographs()
    rows = photographs.rows
    assert sum(row.kind == "background" for row in rows) >= 250
    assert sum(row.kind == "cutout" for row in rows) >= 100
    nouns = {split: {row.noun for row in rows if row.split == split} - {""} for split in SPLITS}
    assert len(nouns["train"]) >= 40
    # A noun has been learned before it is asked for.
    assert nouns["validation"] | nouns["held_out"] <= nouns["train"]
    for split in SPLITS:
        assert len(photographs.backgrounds(split)) >= 15
        assert len(photographs.cutouts(split)) >= 8
        for image in photographs.backgrounds(split):
            height, width = image.shape[:2]
            assert 150 <= min(height, width) <= 288
            assert max(height, width) <= 2 * min(height, width) + 1
        for cutout in photographs.cutouts(split):
            assert 60 <= max(cutout.image.shape) <= 144
            assert cutout.image[..., 3].mean() / 255 > 0.04


def test_no_photograph_is_in_two_splits():
    rows = load_photographs().rows
    splits = {}
    for row in rows:
        splits.setdefault(row.source.replace("http:", "https:") if "File:" in row.source else row.path, set()).add(
            row.split
        )
    assert {source for source, found in splits.items() if len(found) > 1} == set()


def test_what_samples_are_made_from_is_free_of_conditions():
    for row in load_photographs().rows:
        assert row.split == "train" or row.licence in ("PD", "CC0-1.0")


def test_the_attribution_is_that_of_the_table_and_names_each_file():
    rows = read_table(PHOTOGRAPHS / TABLE)
    text = (PHOTOGRAPHS / "ATTRIBUTION.md").read_text("utf-8")
    assert text == attribution(rows)
    for row in rows:
        assert f"| `{row.file}` | " in text
        assert row.author in text
    names = {file.relative_to(PHOTOGRAPHS).as_posix() for file in PHOTOGRAPHS.rglob("*") if file.is_file()}
    assert names == {row.file for row in rows} | {TABLE, "ATTRIBUTION.md"}
    assert sum(file.stat().st_size for file in PHOTOGRAPHS.rglob("*") if file.is_file()) < 9e6


def test_every_versioned_licence_has_its_text():
    rows = [
        Row("a", "background", "", "train", name, "Me", "") for name in ("CC-BY-SA-2.0-DE", "CC-BY-4.0", "CC-BY-SA")
    ]
    links = re.findall(r"- (\S+): <(\S+)>", attribution(rows))
    assert links == [
        ("CC-BY-4.0", "https://creativecommons.org/licenses/by/4.0/"),
        ("CC-BY-SA-2.0-DE", "https://creativecommons.org/licenses/by-sa/2.0/de/"),
    ]
