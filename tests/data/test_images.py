"""Image folders: pixels come through exactly, and every bad file is named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clora.data.images import encode_png, fit, list_images, load_image, load_images, read_image
from clora.errors import CloraError
from clora.files import check_writable, write_atomic


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_round_trip_is_exact(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = load_images(tmp_path, (8, 8))
    assert images.shape == (1, 3, 8, 8)
    assert images.dtype == torch.float32
    restored = images[0].add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(restored, pixels)
    write_atomic(tmp_path / "new" / "b.png", encode_png(restored))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "b.png")), pixels)


def test_crops_the_centre_then_resizes(tmp_path):
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png", (8, 8)), torch.ones(3, 8, 8))
    assert load_image(tmp_path / "a.png", (2, 6)).shape == (3, 2, 6)


@pytest.mark.parametrize(
    ("size", "change"),
    [
        ((1200, 800), "cropped 1200x800 to 800x800, scaled to 64x64"),
        ((100, 64), "cropped 100x64 to 64x64"),
        ((32, 32), "scaled 32x32 to 64x64"),
        ((64, 64), ""),
    ],
)
def test_fitting_states_what_it_did(size, change):
    fitted = fit(Image.new("RGB", size), (64, 64))
    assert (fitted.image.size, fitted.change) == ((64, 64), change)


def test_an_image_is_read_upright_in_its_own_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("L", (12, 8), 7).save(tmp_path / "a.jpg", exif=exif)
    image = read_image(tmp_path / "a.jpg")
    assert (image.size, image.mode) == ((8, 12), "RGB")


def test_names_are_sorted_and_clutter_is_passed_over(tmp_path, pixels):
    for name in ("b.png", "a.jpg", ".hidden", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"")
    for name in ("b.png", "a.jpg"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "sub").mkdir()
    assert [file.name for file in list_images(tmp_path)] == ["a.jpg", "b.png"]
    assert len(load_images(tmp_path, (4, 4))) == 2


def test_modes(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(load_image(tmp_path / "clear.png", (4, 4)), torch.ones(3, 4, 4))
    Image.fromarray(np.full((4, 4), 65535 // 2, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png", (4, 4)).abs().max() < 0.01
    turned = Image.fromarray(np.repeat(np.uint8([[0, 255]]), 2, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = load_image(tmp_path / "turned.png", (2, 2))
    assert torch.equal(upright[0], torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"", r"a\.png is empty \(0 bytes\)"),
        ("a.txt", b"hello", r"a\.txt is not an image"),
        ("a.png", None, r"a\.png is a damaged image"),
    ],
)
def test_bad_file(tmp_path, pixels, name, content, message):
    if content is None:
        Image.fromarray(pixels.repeat(20, 0).repeat(20, 1)).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()[:300]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CloraError, match=message):
        load_images(tmp_path, (8, 8))


@pytest.mark.parametrize("side", [9000, 60_000])
def test_enormous_image_is_refused_from_its_header(tmp_path, side):
    """Both above our limit and above Pillow's own; the file has no pixels at all."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "big.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    with pytest.raises(CloraError, match=r"big\.png is enormous"):
        load_images(tmp_path, (8, 8))


def test_pairs_come_in_one_order_whatever_their_formats(tmp_path, pixels):
    for folder, suffix in (("before", "png"), ("after", "jpg")):
        (tmp_path / folder).mkdir()
        for stem in ("img", "img.m", "img-2"):
            Image.fromarray(pixels).save(tmp_path / folder / f"{stem}.{suffix}")
    before, after = ([file.stem for file in list_images(tmp_path / name)] for name in ("before", "after"))
    assert before == after


@pytest.mark.parametrize("what", ["output", "images"])
def test_a_folder_without_permission(tmp_path, monkeypatch, what):
    """Up to Python 3.11 `Path.exists` itself raises."""

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CloraError, match="Permission denied"):
        check_writable(tmp_path / "a") if what == "output" else load_images(tmp_path / "a", (4, 4))


def write_png_of_16_bits(path, values, clear):
    """Grey or colours; `clear` stands for transparent. Pillow 10.1 writes neither."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    values = values.astype(">u2")
    header = struct.pack(">IIBBBBB", *values.shape[1::-1], 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    parts = (b"IHDR", header), (b"tRNS", np.array(clear, ">u2").tobytes()), (b"IDAT", rows), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


def test_grey_floats_and_the_transparent_grey_of_a_png(tmp_path):
    """Floats up to 1 or up to 255; the grey that stands for transparent is white."""
    ramp = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "one.tif")
    Image.fromarray(ramp * 255).save(tmp_path / "bytes.tif")
    write_png_of_16_bits(tmp_path / "clear.png", (ramp * 65535).round(), 0)
    for name in ("one.tif", "bytes.tif", "clear.png"):
        expected = torch.from_numpy(ramp).mul(2).sub(1)
        if name == "clear.png":
            expected[0, 0] = 1
        torch.testing.assert_close(load_image(tmp_path / name, (4, 4))[0], expected, rtol=0, atol=1 / 127)
    for white, most in ((1, 1.02), (255, 255.5)):  # resizing passes the ends a little
        Image.fromarray(ramp * most).save(tmp_path / "over.tif")
        expected = torch.from_numpy(ramp * (most / white)).clamp(0, 1).mul(2).sub(1)
        torch.testing.assert_close(load_image(tmp_path / "over.tif", (4, 4))[0], expected, rtol=0, atol=1 / 127)
    Image.fromarray((ramp * 2**30).astype(np.int32)).save(tmp_path / "bits.tif")
    with pytest.raises(CloraError, match=r"bits\.tif is a damaged image \(its values go up to 1\.07374e\+09, expected"):
        load_image(tmp_path / "bits.tif", (4, 4))
    ramp[0, 0] = np.nan
    Image.fromarray(ramp).save(tmp_path / "nan.tif")
    with pytest.raises(CloraError, match=r"nan\.tif is a damaged image \(its values are not all finite\)"):
        load_image(tmp_path / "nan.tif", (4, 4))


def test_the_transparent_colour_of_16_bits(tmp_path):
    colours = np.zeros((4, 4, 3))
    colours[:2] = 0x8000, 0x1200, 0xFFFF
    write_png_of_16_bits(tmp_path / "a.png", colours, [0x8000, 0x1200, 0xFFFF])
    image = load_image(tmp_path / "a.png", (4, 4))
    assert (image[:, :2] == 1).all()
    assert (image[:, 2:] == -1).all()


@pytest.mark.parametrize("name", ["a.eps", "a.png"])
def test_eps_is_never_opened(tmp_path, monkeypatch, name):
    """Under any name: Pillow would start Ghostscript on it."""
    from PIL import EpsImagePlugin

    Image.new("RGB", (8, 8)).save(tmp_path / name, format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *call, **more: pytest.fail("Ghostscript is started"))
    with pytest.raises(CloraError, match=rf"{name} is not an image that can be read; expected one of PNG"):
        load_image(tmp_path / name, (8, 8))


def test_bad_folder(tmp_path):
    with pytest.raises(CloraError, match="found nothing"):
        load_images(tmp_path / "none", (8, 8))
    with pytest.raises(CloraError, match="holds no images"):
        load_images(tmp_path, (8, 8))
    (tmp_path / "file").write_text("x")
    with pytest.raises(CloraError, match="found a file"):
        load_images(tmp_path / "file", (8, 8))
