"""``clora try``: the sheet is what the stock pipeline's own calls give, and mistakes come before the pipeline is loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.collection_cases import describe, effect
from helpers.pictures import picture
from PIL import Image

import clora
from clora.collection.write import make_collection, write_collection
from clora.commands import try_
from clora.commands.try_ import OF_THE_DEMO, try_collection
from clora.data.images import fit
from clora.errors import CloraError
from clora.lora.layers import linear_shapes
from clora.lora.load import read_lora
from clora.models.loading import load_pipeline
from clora.studio import assets
from clora.studio.demo_config import demo_config
from clora.studio.teacher_files import teacher_path
from clora.testing import random_lora

# A file that anyone may have made has any name in it.
SNOW, MOEBIUS = effect("snow", ("make it a blueprint",)), effect("../moebius", ("add falling snow",))
LOCAL = "a local Flux2KleinPipeline (folder tiny)"


@pytest.fixture
def write(adapter, tmp_path):
    """Returns write(**values): the folder of a collection on the tiny pipeline."""

    def make(**values):
        student = random_lora(adapter.pipeline.transformer, 4, 7)
        effects = values.pop("effects", (SNOW, MOEBIUS))
        described = describe(*effects, **{"base_model": LOCAL, "provenance": {"dtype": "float32"}, **values})
        return write_collection(student, described, tmp_path / "collection", torch.float32)

    return make


@pytest.fixture
def photo(tmp_path):
    picture(1, (100, 150)).save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


@pytest.fixture
def unloaded(monkeypatch):
    """Fails the test if a pipeline is loaded."""
    monkeypatch.setattr(try_, "load_pipeline", lambda *arguments: pytest.fail("the pipeline is loaded"))


def test_the_pictures_are_those_of_the_stock_call(write, photo, tiny_folder, tmp_path, capsys):
    folder, out = write(), tmp_path / "new" / "sheet.png"
    options = {"seed": 3, "device": "cpu", "pipeline": str(tiny_folder)}
    assert try_collection(str(folder), photo, None, out, tmp_path / "all", **options) == out
    assert "photo.jpg, cropped 150x100 to 112x100, scaled to 72x64" in capsys.readouterr().err
    pipe = load_pipeline(str(tiny_folder), "cpu")
    effects = clora.apply(pipe, folder)
    source = fit(Image.open(photo), (64, 72)).image
    images = {"00_source": source}
    for name, file in (("snow", "01_snow"), ("../moebius", "02__moebius")):
        torch.manual_seed(3)
        images[file] = pipe(image=source, **effects[name]).images[0]
    assert {file.stem for file in (tmp_path / "all").iterdir()} == images.keys()
    for name, image in images.items():
        assert np.array_equal(np.asarray(Image.open(tmp_path / "all" / f"{name}.png")), np.asarray(image)), name
    assert np.asarray(images["01_snow"]).std() > 1
    # Again, one effect only, by the collection's file: neither what stands beside it nor the run before changes it.
    file = folder / "pytorch_lora_weights.safetensors"
    try_collection(str(file), photo, ["../moebius", "../moebius"], out, tmp_path / "one", **options)
    assert (tmp_path / "one" / "01__moebius.png").read_bytes() == (tmp_path / "all" / "02__moebius.png").read_bytes()
    assert len(list((tmp_path / "one").iterdir())) == 2


@pytest.mark.parametrize("mode", ["RGBA", "L", "I;16", "P"])
def test_a_picture_of_any_mode_goes_in(mode, write, tiny_folder, tmp_path):
    array = np.full((40, 30), 40_000 if mode == "I;16" else 90, np.uint16 if mode == "I;16" else np.uint8)
    image = Image.fromarray(array)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.png")
    options = {"names": ["snow"], "out": tmp_path / "s.png", "device": "cpu", "pipeline": str(tiny_folder)}
    assert try_collection(str(write()), tmp_path / "a.png", **options).exists()


def test_the_demos_collection_and_a_photograph_are_the_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = assets.load_studio(assets.ASSETS, "cpu")
    lora = teacher_path(assets.ASSETS, "sepia")
    student = read_lora(lora, linear_shapes(adapter.pipeline.transformer))
    described = make_collection(demo_config(["sepia"], 0), adapter, assets.BASE_MODEL, {"sepia": lora}, {"sepia": None})
    write_collection(student, described, OF_THE_DEMO, torch.float16)
    sheet = try_collection(device="cpu")
    assert sheet == tmp_path / "sheet.png"
    # A colour for every pixel of the source, one brown tone in all of the edit.
    red, _, blue = np.asarray(Image.open(sheet)).astype(int)[14:270, 14 + 270 : 540].reshape(-1, 3).T
    assert (red >= blue).mean() > 0.9
    err = capsys.readouterr().err
    assert f"collection: {OF_THE_DEMO}" in err
    assert "picture: a kingfisher, which no training has seen, cropped" in err
    # A picture may stand in the place of the collection.
    picture(1, (100, 150)).save("photo.png")
    try_collection("photo.png", device="cpu")
    assert "picture: photo.png, cropped 150x100 to 100x100, scaled to 64x64" in capsys.readouterr().err
    with pytest.raises(CloraError, match="found nothing"):
        try_collection("photos/a.jpg", device="cpu")  # a hub id, if it were no picture


def test_without_a_collection_the_message_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CloraError, match="expected a collection .*`clora demo` makes one in"):
        try_collection()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": ["snw"]}, "unknown effect 'snw'.*did you mean 'snow'"),
        ({"photo": None}, "expected a picture after the collection"),
        ({"photo": "nowhere.jpg"}, "expected a picture's file, found nothing"),
        ({"photo": "."}, "expected a picture's file, found a folder"),
        ({"out": "sheet.jpg"}, "write a name that ends in .png"),
        ({"out": "photo.jpg/sheet.png"}, "is a file; choose another output folder"),
        ({"pictures": "photo.jpg"}, "is a file; choose another output folder"),
        ({"device": "gpu"}, "expected auto, cpu"),
        ({"pipeline": None}, "a local Flux2KleinPipeline .folder tiny.*--pipeline"),
    ],
)
def test_mistakes_are_found_before_the_pipeline_is_loaded(
    values, message, write, photo, unloaded, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = write()
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CloraError, match=message):
        try_collection(str(folder), **{"photo": photo, "device": "cpu", "pipeline": "tiny", **values})
    assert set(tmp_path.rglob("*")) == before


def test_the_picture_itself_is_not_replaced(write, unloaded, tmp_path):
    picture(1, (64, 72)).save(tmp_path / "photo.png")
    with pytest.raises(CloraError, match="would be replaced"):
        try_collection(str(write()), tmp_path / "photo.png", out=tmp_path / "photo.png", device="cpu")


def test_a_base_that_cannot_be_loaded_names_the_option(write, photo, monkeypatch, tmp_path):
    def fail(*arguments):
        raise CloraError(f"pipeline {arguments[0]!r}: no such folder")

    monkeypatch.setattr(try_, "load_pipeline", fail)
    with pytest.raises(CloraError, match="pipeline 'some/pipeline'.*--pipeline names another place of some/pipeline"):
        try_collection(str(write(base_model="some/pipeline")), photo, out=tmp_path / "sheet.png", device="cpu")


def test_an_effect_may_have_any_name(write, photo, tiny_folder, tmp_path):
    names = ("source", "a/b", "a b", "\u96ea" * 200)
    folder = write(effects=tuple(effect(name, ("make it",)) for name in names))
    out, options = tmp_path / "s.png", {"pictures": tmp_path / "all", "pipeline": str(tiny_folder), "device": "cpu"}
    try_collection(str(folder), photo, out=out, **options)
    found = sorted(file.stem for file in (tmp_path / "all").iterdir())
    assert found == ["00_source", "01_source", "02_a_b", "03_a_b", "04_" + "\u96ea" * 60]


def test_an_edit_that_fails_leaves_nothing(write, photo, tiny_folder, monkeypatch, tmp_path):
    folder = write()
    monkeypatch.setattr(try_, "_edit", lambda *arguments: 1 / 0)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ZeroDivisionError):
        try_collection(
            str(folder),
            photo,
            out=tmp_path / "a" / "s.png",
            pictures=tmp_path / "b",
            pipeline=str(tiny_folder),
            device="cpu",
        )
    assert set(tmp_path.rglob("*")) == before
