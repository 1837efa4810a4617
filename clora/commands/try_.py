"""``clora try``: a stock pipeline edits one picture with every effect of a collection; the results are one sheet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clora.collection.apply import apply, load_collection
from clora.collection.hub import is_repo_id
from clora.collection.metadata import LORA_FILE, Collection, find_collection
from clora.data.images import Fitted, encode_png, fit, read_image
from clora.devices import find_device, find_dtype
from clora.errors import CloraError
from clora.files import check_writable, user_path, write_atomic
from clora.models.loading import load_pipeline
from clora.progress import say, stage
from clora.report.drawing import draw_sheet
from clora.studio import assets
from clora.studio.photographs import load_photographs

OF_THE_DEMO = Path("clora-demo") / "collection"
SOURCE = "source"


def try_collection(
    collection: str | None = None,
    photo: Path | None = None,
    names: Sequence[str] | None = None,
    out: Path = Path("sheet.png"),
    pictures: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    pipeline: str | None = None,
) -> Path:
    """Edits a picture with a collection's effects, each by the stock pipeline's own call, and writes a sheet of them.

    Everything is checked before the pipeline is loaded, and files are written after the last edit.

    Args:
        collection: its folder, its file or its hub id; None for the demo's in the working directory. A picture that stands
            here is the photo.
        photo: a picture of any size and proportion; None for a held-out photograph, if the collection is of the studio.
        names: the effects, in the order of the sheet; None for all.
        out: the sheet, a PNG file.
        pictures: folder for the single pictures in the collection's size; None to write none.
        seed: of each edit's noise.
        device: where the pipeline runs (`clora.devices.find_device`).
        pipeline: folder or hub id of the base model; None for the one that the collection states.

    Returns:
        The path of the sheet.

    Raises:
        CloraError: no such collection, effect, picture, base model or device, or a place that cannot be written.
    """
    if photo is None and collection is not None and _is_picture(collection):
        collection, photo = None, Path(collection)
    photo = None if photo is None else user_path(photo)
    path = find_collection(_default_collection() if collection is None else collection)
    effects = load_collection(path)
    # Each name once; one that the collection lacks is an error.
    calls = {name: effects[name] for name in (effects if names is None else names)}
    described = effects.collection
    labels = [SOURCE, *calls]
    files = _files(out, pictures, labels, photo)
    target = find_device(device)
    base = _find_base(described, pipeline)
    fitted = _read_photo(photo, described)
    pipe = _load(base, target, described)
    apply(pipe, path)
    _write(labels, [fitted.image, *_edit(pipe, fitted.image, list(calls.values()), seed)], files)
    return files[0]


def _is_picture(path: str) -> bool:
    """Returns True for the name of a picture's file; one that is missing is not looked for on the Hub."""
    local = user_path(path)
    return not local.is_dir() and local.suffix.lower() in Image.registered_extensions()


def _default_collection() -> Path:
    """Returns the collection that a demo has left in the working directory."""
    if not (OF_THE_DEMO / LORA_FILE).exists():
        raise CloraError(
            f"expected a collection (its folder, its file or its hub id), found none; `clora demo` makes one in {OF_THE_DEMO}"
        )
    say(f"collection: {OF_THE_DEMO}, which the demo has made")
    return OF_THE_DEMO


def _files(out: Path, pictures: Path | None, labels: Sequence[str], photo: Path | None) -> list[Path]:
    """Returns the paths of the sheet, and of each single picture if they are wanted; checks them."""
    out = user_path(out)
    if out.suffix.lower() != ".png" or out.is_dir():
        found = "a folder" if out.is_dir() else f"{out.name!r}"
        raise CloraError(f"--out {out}: expected the name of a PNG file, found {found}; write a name that ends in .png")
    files = [check_writable(out.parent) / out.name]
    if pictures is not None:
        folder = check_writable(pictures)
        # Names come out of a file that anyone may have made. Numbers keep the sheet's order, and apart what becomes the same.
        safe = [re.sub(r"[^\w-]+", "_", label)[:60] for label in labels]
        files += [folder / f"{i:02d}_{name}.png" for i, name in enumerate(safe)]
    for file in files:
        if photo is not None and file.exists() and photo.exists() and file.samefile(photo):
            raise CloraError(f"{file} is the picture that is edited, and would be replaced; write to another place")
    return files


def _find_base(collection: Collection, pipeline: str | None) -> str:
    """Returns the folder or hub id of a collection's base model."""
    if pipeline is not None:
        local = user_path(pipeline)
        return str(local) if local.exists() else pipeline
    if collection.base_model == assets.BASE_MODEL:
        return str(assets.pipeline_folder())
    if is_repo_id(collection.base_model):
        return collection.base_model
    raise CloraError(
        f"the collection's base model is {collection.base_model}, and where that is its file does not state; name the "
        f"folder or hub id of this {collection.pipeline} with --pipeline"
    )


def _read_photo(photo: Path | None, collection: Collection) -> Fitted:
    """Returns the picture in the size of the collection, and reports how it was cropped and scaled."""
    if photo is None:
        if collection.base_model != assets.BASE_MODEL:
            raise CloraError(
                f"expected a picture after the collection, found none; only one of {assets.BASE_MODEL} brings a photograph of its own"
            )
        name = "a kingfisher, which no training has seen"
        image = Image.fromarray(load_photographs().background("held_out", "kingfisher"))
    else:
        if not photo.is_file():
            found = "a folder" if photo.is_dir() else "a device or a pipe" if photo.exists() else "nothing"
            raise CloraError(f"{photo}: expected a picture's file, found {found}")
        name, image = str(photo), read_image(photo)
    fitted = fit(image, collection.sampling.size)
    say(f"picture: {name}{', ' if fitted.change else ''}{fitted.change}")
    return fitted


def _load(base: str, device: torch.device, collection: Collection) -> Any:
    """Loads the base model in float32, if the collection was made in that, else in the device's own dtype."""
    # The same values for a seed on CPUs with AMX as on others, where a model is small enough for float32.
    recorded = collection.provenance.get("dtype")
    dtype = find_dtype("float32" if recorded == "float32" else "auto", device)
    with stage(f"load {base}", None):
        try:
            pipe = load_pipeline(base, str(device), dtype)
        except CloraError as error:
            raise CloraError(f"{error}; --pipeline names another place of {collection.base_model}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _edit(pipe: Any, source: Image.Image, calls: Sequence[Mapping[str, Any]], seed: int) -> list[Image.Image]:
    """Edits the picture with each effect by the pipeline's own call."""
    results = []
    with stage("edit", len(calls)) as advance:
        # One by one: not every pipeline takes several prompts, and an effect's noise depends on no other effect.
        for call in calls:
            torch.manual_seed(seed)  # the sampler re-noises from the global generator
            results.append(pipe(image=source, **call).images[0])
            advance(1)
    return results


def _write(labels: Sequence[str], results: Sequence[Image.Image], files: Sequence[Path]) -> None:
    """Writes the sheet to the first file, and each picture to those that follow."""
    images = [image.convert("RGB") for image in results]
    # Not every pipeline keeps to the size of its call.
    cells = np.stack([np.asarray(image.resize(images[0].size)) for image in images])
    write_atomic(files[0], encode_png(draw_sheet(labels, cells)))
    for file, image in zip(files[1:], images, strict=False):  # none, if only the sheet is wanted
        write_atomic(file, encode_png(np.asarray(image)))
