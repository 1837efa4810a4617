"""ATTRIBUTION.md of a folder of photographs: author, source, licence and changes of each picture."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from clora.studio.photographs import Row

_HEAD = """\
# Who made these photographs

The pictures in this folder are by the authors named below, each under the licence named beside it. They are apart from the
code around them: its licence, Apache-2.0, does not cover them. Every picture was saved anew as WebP, and shrunk where it was
larger than is needed here; what else was changed stands beside it. A picture that shows one of them, such as a sample or a
screenshot, is under its licence too.
The pictures of the splits `validation` and `held_out`, which samples and reports are made from, are free of conditions.

`PD` is in the public domain: its author or the law of its country has made it free. `CC0-1.0` is a waiver of all rights
(<https://creativecommons.org/publicdomain/zero/1.0/>). `CC-BY` asks that the author is named and changes are stated,
`CC-BY-SA` also that what is made from a picture is shared under the same licence. The texts of the versions:
"""
_UNVERSIONED = """
`CC-BY-SA` without a version: the author names none.
"""
_SOURCES = """
The packages state the licences: GCompris in the `README` files of its `.rcc` archives, Tux Paint in `docs/CONTRIBUTORS.txt` and
`docs/CHANGES.txt` of its stamps (<https://tuxpaint.org/>), Lomiri in its `copyright` file, Palapeli in the `.desktop` file beside each
picture, scikit-image in `skimage/data/_fetchers.py`, scikit-learn in `sklearn/datasets/images/README.txt`. What NASA, NOAA
and other offices of the United States made is in the public domain there.
"""


def attribution(rows: Sequence[Row]) -> str:
    """Returns the text of ATTRIBUTION.md."""
    licences = Counter(row.licence for row in rows)
    texts = [f"- {name}: <{licence_text(name)}>\n" for name in sorted(licences) if licence_text(name)]
    lines = [_HEAD, "\n", *texts]
    if "CC-BY-SA" in licences:
        lines.append(_UNVERSIONED)
    lines += [_SOURCES, "\n| licence | pictures |\n|---|---|\n"]
    lines += [f"| {name} | {number} |\n" for name, number in sorted(licences.items())]
    lines += ["\n| picture | author | licence | source | changes |\n|---|---|---|---|---|\n"]
    for row in rows:
        source = f"<{row.source}>" if row.source else f"in the package {row.package}"
        author = row.author or "not known"
        cells = (f"`{row.file}`", author, row.licence, source, row.changes)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(lines)


def licence_text(licence: str) -> str:
    """Returns the address of the text of a CC-BY or CC-BY-SA licence whose version is known; empty for others."""
    match = re.fullmatch(r"CC-(BY|BY-SA)-(\d\.\d)(?:-([A-Z]{2}))?", licence)
    if match is None:
        return ""
    kind, version, country = match.groups()
    return f"https://creativecommons.org/licenses/{kind.lower()}/{version}/" + (
        f"{country.lower()}/" if country else ""
    )
