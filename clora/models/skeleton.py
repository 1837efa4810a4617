"""A pipeline without its weights, which `clora plan` counts with: models from their configs, tokenizers and schedulers."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from clora.errors import CloraError
from clora.files import read_text
from clora.progress import quiet_libraries

LIBRARIES = ("diffusers", "transformers", None)
"""Those whose classes a pipeline may have as components; None is an absent one."""
WEIGHTS = ["*.safetensors", "*.bin", "*.pt", "*.ckpt", "*.msgpack", "*.onnx*", "*.gguf"]


def pipeline_folder(path: str) -> Path:
    """Returns the folder of a pipeline; of one on the Hub, everything but its weights is downloaded.

    Raises:
        CloraError: neither a folder nor a repository that can be reached.
    """
    folder = Path(path)
    if folder.exists():
        return folder
    if folder.is_absolute() or path.startswith("."):
        raise CloraError(f"pipeline {path!r}: no such folder; expected a pipeline's folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=WEIGHTS))
    except Exception as error:  # the hub's client raises many kinds: no network, no such repository, no access
        raise CloraError(
            f"pipeline {path!r}: no such folder, and it could not be downloaded from the Hub ({error}); check the name and "
            "your connection"
        ) from error


def skeleton(path: str, dtype: torch.dtype) -> Any:
    """Loads a pipeline without its weights.

    diffusers' models are on fake tensors, which cost nothing and can be computed with under their own ``fake_mode``. Text
    encoders are on the meta device, since transformers fills them with values that fake tensors do not have.

    Args:
        path: folder or hub id; only configs and tokenizers are read.
        dtype: of the models.

    Raises:
        CloraError: no diffusers pipeline, or a component whose config cannot be used.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    folder = pipeline_folder(path)
    index, pipeline_class = _read_index(path, folder)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts = {}
    with quiet_libraries():
        for name, value in index.items():
            if not name.startswith("_"):
                parts[name] = _component(folder / name, *value, dtype, mode) if isinstance(value, list) else value
        try:
            return pipeline_class(**parts)
        except Exception as error:  # parts that are missing, or of another kind
            raise CloraError(
                f"pipeline {path!r}: its model_index.json does not fit {pipeline_class.__name__}: {error}"
            ) from error


def check_processors(path: str) -> None:
    """Checks that a pipeline's processors can be loaded, so that an error comes before hours of loading weights.

    Args:
        path: folder or hub id; no weights are downloaded.

    Raises:
        CloraError: no diffusers pipeline, or a processor that cannot be loaded.
    """
    folder = pipeline_folder(path)
    with quiet_libraries():
        for name, value in _read_index(path, folder)[0].items():
            if isinstance(value, list) and "Processor" in (value[1] or ""):
                _component(folder / name, *value, torch.float32, None)


def _read_index(path: str, folder: Path) -> tuple[dict[str, Any], Any]:
    """Returns a pipeline's model_index.json, and the class that it names."""
    try:
        index = json.loads(read_text(folder / "model_index.json", "the index of a pipeline"))
        diffusers = importlib.import_module("diffusers")
        pipeline_class = getattr(diffusers, index["_class_name"])
        if not issubclass(pipeline_class, diffusers.DiffusionPipeline):
            raise TypeError(f"{index['_class_name']} is no pipeline")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CloraError(
            f"pipeline {path!r} is not a diffusers pipeline that this version knows ({folder / 'model_index.json'}: "
            f"{error!r}); expected a folder as save_pretrained writes it, or a newer diffusers"
        ) from error
    for name, value in index.items():
        # diffusers imports what stands here, whatever it does when it is imported.
        if isinstance(value, list) and (
            len(value) != 2 or value[0] not in LIBRARIES or not isinstance(value[1], str | None)
        ):
            raise CloraError(
                f"pipeline {path!r}: {folder / 'model_index.json'}: {name}: expected a class of diffusers or transformers, found "
                f"{value}; other code is never imported"
            )
    return index, pipeline_class


def _component(folder: Path, library: str | None, name: str | None, dtype: torch.dtype, mode: Any) -> Any:
    """Builds a model from its config, or loads a tokenizer, processor or scheduler; None for an absent component."""
    if library is None or name is None:
        return None
    try:
        found = getattr(importlib.import_module(library), name)
        if not issubclass(found, torch.nn.Module):
            return found.from_pretrained(folder)
        with _default_dtype(dtype), mode if library == "diffusers" else torch.device("meta"):
            if library == "diffusers":
                model = found.from_config(found.load_config(folder))
            else:
                model = found(found.config_class.from_pretrained(folder))
            return model.eval().requires_grad_(False)
    except Exception as error:  # readers of damaged configs raise errors of many kinds
        reason = str(error)
        # transformers reads pictures and videos with torchvision, and its own message about that is long.
        # One of another build than torch is there, but its operators are not.
        if "torchvision" in reason.lower():
            reason = f"it needs torchvision; {torchvision_command(torch.__version__)}"
        raise CloraError(f"{folder} cannot be loaded as {name}: {reason}") from error


def torchvision_command(torch_version: str) -> str:
    """Returns the command that installs torchvision beside an installed torch, which stays as it is; advice for other builds.

    Args:
        torch_version: ``torch.__version__``, such as ``2.13.0+cpu``.
    """
    release, _, build = torch_version.partition("+")
    if build and not re.fullmatch(r"cpu|xpu|cu\d+|rocm[\d.]+", build) or not re.fullmatch(r"[\d.]+", release):
        return f"install the torchvision that was built with torch {torch_version}, from where this torch came"
    # pip chooses the torchvision that requires this torch; of PyTorch's own builds, such as +cpu, the one of the same build.
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"pip install torch=={release} torchvision{index}"


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
