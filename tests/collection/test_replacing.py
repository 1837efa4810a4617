"""A collection is replaced whole: whenever a write ends, the folder holds the old one, no weights, or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.collection_cases import describe, effect

from clora.collection.write import LORA_FILE, add_samples, is_finished, write_collection
from clora.errors import CloraError
from clora.testing import random_lora, tiny_pipeline


@pytest.fixture(scope="module")
def student():
    return random_lora(tiny_pipeline().transformer, 4, 7)


def test_a_folder_that_cannot_be_written_stays_as_it_was(student, tmp_path, monkeypatch):
    (tmp_path / "scheduler").write_text("a file where the folder should be")
    with pytest.raises(CloraError, match="is a file"):
        write_collection(student, describe(), tmp_path, torch.float32)
    assert [file.name for file in tmp_path.iterdir()] == ["scheduler"]

    folder = write_collection(student, describe(), tmp_path / "new", torch.float32)
    before = contents(folder)
    write_bytes = Path.write_bytes

    def full(path, content):
        if path.name == "scheduler_config.json":
            raise OSError("no space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CloraError, match="scheduler_config.json cannot be written: no space left"):
        write_collection(student, describe(shift=2.0), folder, torch.float32)
    assert contents(folder) == before


def contents(folder):
    """The bytes of all files of a folder by their names, hidden ones included."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def visible(folder):
    return {name: content for name, content in contents(folder).items() if not name.startswith((".", "scheduler/."))}


class Killed(BaseException):
    """Stands for the death of the process: nothing after it runs."""


def killed_at(monkeypatch, step, write):
    """Runs a write of which only the first `step` changes of names happen; returns whether it died."""
    done = 0

    def counted(change):
        def changed(*arguments, **keywords):
            nonlocal done
            if done == step:
                raise Killed
            done += 1
            return change(*arguments, **keywords)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            write()
        except Killed:
            return True
    return False


def test_weights_never_stand_beside_the_files_of_another_collection(student, tmp_path, monkeypatch):
    old, new = describe(shift=2.0), describe(effect("b", ("another prompt",)), shift=3.0)
    wholes = [visible(write_collection(student, c, tmp_path / str(i), torch.float32)) for i, c in enumerate((old, new))]
    wholes[0]["samples.png"] = b"a picture"
    step, seen = 0, []
    while True:
        folder = write_collection(student, old, tmp_path / f"at {step}", torch.float32)
        (folder / "samples.png").write_bytes(b"a picture")
        is_dead = killed_at(monkeypatch, step, lambda f=folder: write_collection(student, new, f, torch.float32))
        found = visible(folder)
        assert LORA_FILE not in found or found in wholes, f"after {step} changes"
        assert is_finished(folder, new) == (found == wholes[1])
        seen.append(found)
        if not is_dead:
            break
        # The next run completes it.
        assert visible(write_collection(student, new, folder, torch.float32)) == wholes[1]
        step += 1
    assert wholes[0] in seen
    assert seen[-1] == wholes[1]
    assert step >= 5


def test_samples_never_stand_without_a_card_that_shows_them(student, tmp_path, monkeypatch):
    """The next run takes samples as the sign that nothing is left to do."""
    folder, step = write_collection(student, describe(), tmp_path, torch.float32), 0
    while killed_at(monkeypatch, step, lambda: add_samples(folder, b"a picture")):
        assert not (folder / "samples.png").exists()
        step += 1
    assert step == 2
    assert (folder / "samples.png").read_bytes() == b"a picture"
    assert "samples.png" in (folder / "README.md").read_text()


def test_equal_runs_give_equal_bytes(student, tmp_path):
    described = describe(effect(license="mit"), metrics={"accuracy": 0.98}, provenance={"seed": 5})
    folders = [write_collection(student, described, tmp_path / str(i), torch.float32) for i in range(6)]
    assert all(contents(folder) == contents(folders[0]) for folder in folders)


def test_a_collection_is_finished_by_its_contents(student, tmp_path):
    described = describe()
    folder = write_collection(student, described, tmp_path / "out", torch.bfloat16)
    assert is_finished(folder, described)
    assert not is_finished(folder, describe(shift=2.0))
    for name, content in contents(folder).items():
        for damaged in (content[: len(content) // 2], b"", content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]):
            (folder / name).write_bytes(damaged)
            # A person may edit the card.
            assert not is_finished(folder, described) or (name == "README.md" and b"Distilled with clora" in damaged)
        (folder / name).unlink()
        assert not is_finished(folder, described)
        (folder / name).write_bytes(content)
    assert is_finished(folder, described)
