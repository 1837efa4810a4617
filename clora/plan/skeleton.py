"""A pipeline without its weights: every model built from its config on fake tensors, tokenizers and schedulers whole."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clora.errors import CloraError
from clora.paths import user_path

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*", "*.gguf")


def pipeline_folder(path: str) -> Path:
    """The folder of a pipeline; of one on the Hub, everything but its weights is downloaded.

    Raises:
        CloraError: neither a folder nor a repository that can be reached.
    """
    folder = user_path(path)
    if folder.exists():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")):
        raise CloraError(f"pipeline {path!r}: no such folder; expected a pipeline's folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=list(WEIGHTS)))
    except Exception as error:  # the hub's client raises many kinds: no network, no such repository, no access
        raise CloraError(
            f"pipeline {path!r}: there is no such folder, and it cannot be had from the Hub ({error})"
        ) from error


@contextmanager
def skeleton(path: str, dtype: torch.dtype) -> Iterator[Any]:
    """Yields the pipeline of a folder or hub id without its weights; tensors made inside are fake and cost nothing.

    Args:
        path: folder or hub id; only configs and tokenizers are read.
        dtype: of the models.

    Raises:
        CloraError: no diffusers pipeline, or a component whose config cannot be used.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    folder = pipeline_folder(path)
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        pipeline_class = getattr(importlib.import_module("diffusers"), index["_class_name"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CloraError(
            f"pipeline {path!r} is no diffusers pipeline that is known here ({folder / 'model_index.json'}: {error!r}); "
            "expected a folder as save_pretrained writes it, or a newer diffusers"
        ) from error
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    settings = {name: value for name, value in parts.items() if not isinstance(value, list)}
    named = {name: value for name, value in parts.items() if isinstance(value, list)}
    whole = {name: _load(folder / name, *value) for name, value in named.items() if not _is_model(*value)}
    with FakeTensorMode(allow_non_fake_inputs=True), _default_dtype(dtype):
        models = {name: _build(folder / name, *value) for name, value in named.items() if _is_model(*value)}
        with _default_dtype(torch.float32):
            yield pipeline_class(**whole, **models, **settings)


def _class(library: str | None, name: str | None) -> Any:
    return None if library is None else getattr(importlib.import_module(library), name)


def _is_model(library: str | None, name: str | None) -> bool:
    found = _class(library, name)
    return isinstance(found, type) and issubclass(found, torch.nn.Module)


def _load(folder: Path, library: str | None, name: str | None) -> Any:
    """A tokenizer, processor or scheduler; None for a component that the pipeline does without."""
    found = _class(library, name)
    if found is None:
        return None
    try:
        return found.from_pretrained(folder)
    except Exception as error:  # readers of damaged configs raise whatever they meet
        raise CloraError(f"{folder} cannot be loaded as {name}: {error}") from error


def _build(folder: Path, library: str, name: str) -> torch.nn.Module:
    """A model from its config alone."""
    found = _class(library, name)
    try:
        if library == "diffusers":
            model = found.from_config(found.load_config(folder))
        else:
            model = found(found.config_class.from_pretrained(folder))
        return model.eval().requires_grad_(False)
    except Exception as error:
        raise CloraError(f"{folder} has no usable config of {name}: {error}") from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
