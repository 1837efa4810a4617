"""Training pictures of every kind that cameras, painting programs and scanners write.

Reports: kohya-ss/musubi-tuner #695 (EXIF orientation), ostris/ai-toolkit #640 (alpha learnt as black),
the-database/traiNNer-redux #298 (16 bits), bmaltais/kohya_ss #1349 (odd PNGs).
Right: what a viewer shows, in [-1, 1], with transparent parts on one plain colour (clora documents white), within 3/255.
"""

import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from clora.data.images import load_image
from clora.errors import CloraError

folder, bad = Path(tempfile.mkdtemp()), 0
y, x = np.mgrid[0:48, 0:64]
rgb = np.stack([x * 4, y * 5, 255 - x * 3], -1).clip(0, 255).astype("uint8")
grey = (x * 4).clip(0, 255).astype("uint8")


def png(path, array, depth, colour, trns=None):
    """A PNG written by hand: Pillow cannot write 16-bit RGB, RGBA or LA."""
    h, w = array.shape[:2]
    raw = b"".join(b"\0" + array[r].astype(">u2" if depth == 16 else "u1").tobytes() for r in range(h))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    extra = b"" if trns is None else chunk(b"tRNS", trns)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def check(name, want, tolerance=3.0, size=None, write=None):
    global bad
    file = folder / name
    try:
        if write:
            write(file)
    except Exception as error:
        print(f"{name}: not made here ({error})")
        return
    try:
        got = (load_image(file, size or want.shape[:2]).permute(1, 2, 0).numpy() + 1) * 127.5
    except CloraError as error:
        print(f"{name}: WRONG, refused: {error}")
        bad = 1
        return
    off = np.abs(got - want.astype(float)).mean()
    print(f"{name}: mean off by {off:.2f} of 255{' WRONG' if off > tolerance else ''}")
    bad |= bool(off > tolerance)


alpha = np.where(x < 32, 255, 0).astype("uint8")
half = np.full_like(alpha, 128)
on_white = lambda c, a: (c.astype(float) * (a / 255.0)[..., None] + 255 * (1 - (a / 255.0)[..., None])).round()  # noqa: E731
three = lambda g: np.repeat(g[..., None], 3, -1)  # noqa: E731
for tag, turn in ((3, 2), (6, 1), (8, 3)):
    stored = np.rot90(rgb, turn)

    def turned():  # anew each time: Pillow keeps what the last format made of it
        exif = Image.Exif()
        exif[0x0112] = tag
        return exif

    check(
        f"exif{tag}.jpg",
        rgb,
        write=lambda f: Image.fromarray(np.ascontiguousarray(stored)).save(f, quality=98, subsampling=0, exif=turned()),
    )
    check(f"exif{tag}.png", rgb, write=lambda f: Image.fromarray(np.ascontiguousarray(stored)).save(f, exif=turned()))
    check(
        f"exif{tag}.webp",
        rgb,
        write=lambda f: Image.fromarray(np.ascontiguousarray(stored)).save(f, lossless=True, exif=turned()),
    )
    check(
        f"exif{tag}.avif",
        rgb,
        6,
        write=lambda f: Image.fromarray(np.ascontiguousarray(stored)).save(
            f, quality=100, subsampling="4:4:4", exif=turned()
        ),
    )
    check(f"exif{tag}.tif", rgb, write=lambda f: Image.fromarray(np.ascontiguousarray(stored)).save(f, exif=turned()))
check("rgba.png", on_white(rgb, alpha), write=lambda f: Image.fromarray(np.dstack([rgb, alpha])).save(f))
check(
    "rgba_half.webp",
    on_white(rgb, half),
    write=lambda f: Image.fromarray(np.dstack([rgb, half])).save(f, lossless=True, exact=True),
)
check("la.png", on_white(three(grey), alpha), write=lambda f: Image.fromarray(np.dstack([grey, alpha]), "LA").save(f))
check("palette.gif", rgb, 8, write=lambda f: Image.fromarray(rgb).quantize(256).save(f))
palette = Image.fromarray(np.where(x < 32, 1, 0).astype("uint8"), "P")
palette.putpalette([200, 10, 10, 20, 120, 220])
check(
    "palette_trns.png",
    on_white(three(np.zeros_like(grey)) + np.array([20, 120, 220]), alpha),
    write=lambda f: palette.save(f, transparency=0),
)
check("grey16.png", three(grey), write=lambda f: png(f, grey.astype("u2") * 257, 16, 0))
check("rgb16.png", rgb, write=lambda f: png(f, rgb.astype("u2") * 257, 16, 2))
check("rgba16.png", on_white(rgb, alpha), write=lambda f: png(f, np.dstack([rgb, alpha]).astype("u2") * 257, 16, 6))
check(
    "la16.png", on_white(three(grey), alpha), write=lambda f: png(f, np.dstack([grey, alpha]).astype("u2") * 257, 16, 4)
)
check(
    "grey16_trns.png",
    on_white(three(grey), np.where(grey == 0, 0, 255)),
    write=lambda f: png(f, grey.astype("u2") * 257, 16, 0, struct.pack(">H", 0)),
)
check(
    "grey8_trns.png",
    on_white(three(grey), np.where(grey == 0, 0, 255)),
    write=lambda f: png(f, grey, 8, 0, struct.pack(">H", 0)),
)
check("grey16.tif", three(grey), write=lambda f: Image.fromarray(grey.astype("u2") * 257).save(f))
check("grey32.tif", three(grey), write=lambda f: Image.fromarray(grey.astype("i4") * 257).save(f))
check("float01.tif", three(grey), write=lambda f: Image.fromarray((grey / 255).astype("f4")).save(f))
check("float255.tif", three(grey), write=lambda f: Image.fromarray(grey.astype("f4")).save(f))
check("cmyk.jpg", rgb, 8, write=lambda f: Image.fromarray(rgb).convert("CMYK").save(f, quality=98, subsampling=0))
check("cmyk.tif", rgb, 8, write=lambda f: Image.fromarray(rgb).convert("CMYK").save(f))
check(
    "one_bit.png",
    three(np.where(x < 32, 255, 0).astype("uint8")),
    write=lambda f: Image.fromarray(np.where(x < 32, 255, 0).astype("uint8")).convert("1").save(f),
)
check("lab.tif", rgb, 8, write=lambda f: Image.fromarray(rgb).convert("LAB").save(f))
check("фото 雪 ❄.png", rgb, write=lambda f: Image.fromarray(rgb).save(f))
check(
    "animated.webp",
    rgb,
    write=lambda f: Image.fromarray(rgb).save(
        f, save_all=True, append_images=[Image.fromarray(255 - rgb)], lossless=True
    ),
)
check("UPPER.JPEG", rgb, write=lambda f: Image.fromarray(rgb).save(f, format="JPEG", quality=98, subsampling=0))
check("wrong_suffix.png", rgb, write=lambda f: Image.fromarray(rgb).save(f, format="JPEG", quality=98, subsampling=0))
sys.exit(bad)
