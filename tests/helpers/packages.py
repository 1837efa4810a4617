"""Small Debian packages, Qt resource archives and pictures."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image


def deb(files, compression="xz"):
    """A .deb with files: path to content."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    result = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        result += header.encode() + content + b"\n" * (len(content) % 2)
    return result


def rcc(files, version=3, compressed=()):
    """A Qt resource archive with files: path of two parts, folder/name, to content."""
    folders = sorted({path.split("/")[0] for path in files})
    children = {folder: sorted(path for path in files if path.startswith(folder + "/")) for folder in folders}
    names, data, entries = b"", b"", []

    def name_at(name):
        nonlocal names
        place = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        return place

    entries.append(struct.pack(">IHII", 0, 2, len(folders), 1))
    first = 1 + len(folders)
    for folder in folders:
        entries.append(struct.pack(">IHII", name_at(folder), 2, len(children[folder]), first))
        first += len(children[folder])
    for folder in folders:
        for path in children[folder]:
            content, flags = files[path], int(path in compressed)
            if flags:
                content = struct.pack(">I", len(content)) + zlib.compress(content)
            entries.append(struct.pack(">IHHHI", name_at(path.split("/")[1]), flags, 0, 0, len(data)))
            data += struct.pack(">I", len(content)) + content
    time = bytes(8) if version >= 2 else b""
    tree = b"".join(entry + time for entry in entries)
    start = 4 + 16 + (4 if version >= 3 else 0)
    header = struct.pack(">4I", version, start, start + len(tree), start + len(tree) + len(data))
    return b"qres" + header + (bytes(4) if version >= 3 else b"") + tree + data + names


def picture(size=(40, 30), mode="RGB", seed=0, format="PNG"):
    """A file with a random picture; an RGBA one is transparent but for an ellipse in its middle."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    if mode == "RGBA":
        y, x = np.ogrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j]
        opaque = x**2 + y**2 < 0.25
        pixels[..., 3] = 255 * opaque
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()
