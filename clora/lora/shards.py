"""A LoRA in several safetensors files, its shards, with an index of the tensors that each of them holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from clora.errors import CloraError
from clora.files import read_text

INDEX = ".safetensors.index.json"
_SHARD = re.compile(r".+-0*(\d{1,5})-of-0*(\d{1,5})\.safetensors")


def all_shards(file: Path) -> list[Path]:
    """Returns the safetensors files of a LoRA: the file itself, or those of an index."""
    return [file.with_name(name) for name in _shard_names(file)] if file.name.endswith(INDEX) else [file]


def _weight_map(index: Path) -> dict[str, str]:
    """Reads the tensor names of an index and the shards that hold them.

    Raises:
        CloraError: no index of safetensors files in its own folder.
    """
    expected = "the index of a LoRA's shards"
    try:
        found = json.loads(read_text(index, expected))["weight_map"]
        names = set(found.values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CloraError(f"{index}: expected {expected} with a weight_map, found another content ({error})") from error
    for name in names:
        # A name with a folder could be any file of the machine.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CloraError(f"{index}: expected names of .safetensors files beside it, found {name!r}")
    if not names:
        raise CloraError(f"{index}: its weight_map is empty; download the index again")
    return found


def _shard_names(index: Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def check_index(index: Path, files: Mapping[str, Path]) -> None:
    """Raises CloraError unless the shards hold exactly the tensors that their index states."""
    stated = _weight_map(index)
    wrong = sorted(
        key for key in stated.keys() | files.keys() if key not in files or stated.get(key) != files[key].name
    )
    if wrong:
        raise CloraError(
            f"{index} and its shards disagree about {len(wrong)} tensor(s), for example {wrong[0]}: index "
            f"{stated.get(wrong[0], 'none')}, found in {files[wrong[0]].name if wrong[0] in files else 'none'}. Download all of them again"
        )


def refuse_shard(file: Path) -> None:
    """Raises CloraError for one shard of several, which is a part of a LoRA."""
    for index in sorted(file.parent.glob(f"*{INDEX}")):
        names: list[str] = []
        with suppress(CloraError):  # a damaged index of another LoRA says nothing about this one
            names = _shard_names(index)
        if file.name in names and len(names) > 1:
            others = ", ".join(name for name in names[:4] if name != file.name)
            raise CloraError(f"{file} is one shard of a LoRA, with {others}; name the folder or the index, {index}")
    numbers = _SHARD.fullmatch(file.name)
    if numbers and int(numbers[2]) > 1:
        raise CloraError(
            f"{file} is by its name shard {int(numbers[1])} of {int(numbers[2])} of a LoRA, and no index is beside it; "
            f"expected all shards with their index (NAME{INDEX}). If it is a whole LoRA, rename it"
        )
