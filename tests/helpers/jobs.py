"""A small job of the command line in a folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from helpers.fault_runs import Runs


@dataclass(frozen=True)
class Job:
    """A run of four updates in a folder: ``out``, and what else the folder holds.

    Attributes:
        folder: places (`helpers.fault_runs`) are counted below it.
        tree: the config.
        runs: starts the command.
    """

    folder: Path
    tree: dict
    runs: Runs

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self, fault=None, output="out", **settings):
        """Starts the job with a fault, and with settings replaced (``data__cache=...``)."""
        return self.runs.start(self._arguments(output, settings), fault)

    def run(self, fault=None, output="out", **settings):
        """Runs the job to its end; returns the exit code and what was said."""
        return self.runs.run(self._arguments(output, settings), fault)

    def _arguments(self, output, settings):
        file = self.folder.parent / f"{output}.yaml"
        file.write_text(yaml.safe_dump(self.tree | {"output": str(self.folder / output)}))
        return ["distill", file, *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]


def make_job(folder, tree):
    (folder / "work").mkdir()
    return Job(folder / "work", tree, Runs(folder / "work", folder / "records"))
