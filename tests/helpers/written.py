"""What a run has written: compared with what another wrote, checked for halves, and damaged on purpose."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clora.collection.metadata import LORA_FILE, SAMPLES_FILE, read_collection
from clora.collection.write import SCHEDULER_FILE, WEIGHTS_DIGEST, _scheduler_text
from clora.commands.distill import CACHE, FINISHED
from clora.hashing import digest, tensor_digest
from clora.report.history import HISTORY
from clora.report.run_report import RUN_REPORT
from clora.training.checkpoint import load_values

# The first place of each phase is the first that has this in its path.
BEGINNINGS = {
    "starting": "",
    "encoding": "/prompts/",
    "rendering": "/targets/",
    "training": "/checkpoints/",
    "exporting": f"out/.{LORA_FILE}",
    "ending": f"out/.{SAMPLES_FILE}",
}


TIMED = (HISTORY, RUN_REPORT)
"""What states how long a run took, and so differs from another's."""


def files_of(folder: Path) -> dict[Path, bytes]:
    """Returns the bytes of every file in a folder but for `TIMED`."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name not in TIMED}


def phases(places: Sequence[str]) -> dict[str, range]:
    """Splits the places of an undisturbed run into those of its phases."""
    starts = [next(i for i, place in enumerate(places) if part in place) for part in BEGINNINGS.values()]
    assert starts == sorted(starts)
    return {
        name: range(*ends)
        for name, ends in zip(BEGINNINGS, zip(starts, [*starts[1:], len(places)], strict=True), strict=True)
    }


@dataclass(frozen=True)
class Written:
    """The content of an output folder.

    Attributes:
        folders: names of all folders in it.
        files: the bytes of each file by its name, except for the last checkpoint and `TIMED`, which state how long it took.
        finished: digest of the tensors of that checkpoint.
    """

    folders: frozenset[str]
    files: Mapping[str, bytes]
    finished: str

    @staticmethod
    def read(output: Path) -> Written:
        paths = {str(path.relative_to(output)): path for path in output.rglob("*") if path.name not in TIMED}
        finished = tensor_digest(load_file(paths.pop(FINISHED)))
        files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
        return Written(frozenset({*paths} - {*files}), files, finished)


def assert_all_whole(output: Path) -> None:
    """Checks that whatever has a name of its own is whole, and that the collection's files belong together."""
    for path in output.rglob("*"):
        if path.suffix != ".safetensors" or any(part.endswith(".tmp") for part in path.parts):
            continue
        kind = path.parent.name
        if kind == "checkpoints" or path == output / FINISHED:
            assert load_values(path)
        else:
            with safe_open(path, "pt") as file:
                stated = file.metadata()["sha256" if CACHE in path.parts else WEIGHTS_DIGEST]
            assert stated == tensor_digest(load_file(path)), path
    if (output / LORA_FILE).exists():
        collection = read_collection(output)
        assert (output / SCHEDULER_FILE).read_text() == _scheduler_text(collection)
        card = (output / "README.md").read_text()
        assert all(effect.name in card for effect in collection.effects)


def cut(content: bytes, chance: random.Random) -> bytes:
    """The first part of a file."""
    return content[: chance.randrange(1, len(content))]


def flip(content: bytes, chance: random.Random) -> bytes:
    """A file with one bit changed."""
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def empty(content: bytes, chance: random.Random) -> bytes:
    """A file whose content never reached the disk."""
    return b""


def zeros(content: bytes, chance: random.Random) -> bytes:
    """A file of which only the length reached the disk."""
    return bytes(len(content))


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, empty, zeros)


def rewrite(file, change, hashed=True):
    """Changes tensors and values of a file, with the hash of what it has then, or without one."""
    with safe_open(file, "pt") as opened:
        flat, values = {k: opened.get_tensor(k) for k in opened.keys()}, json.loads(opened.metadata()["values"])  # noqa: SIM118
    text = json.dumps(change(flat, values))
    digests = {"sha256": digest([text, tensor_digest(flat)])} if hashed else {}
    save_file(flat, file, {"values": text, **digests})
