"""Arguments of the commands, checked before anything is measured or written: a wrong one is one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import NoReturn

import torch

from bench.machine import ROOT
from clora.errors import CloraError

CANNOT_RUN = 2
"""Exit code where nothing was run, as argparse has it."""
RESULTS = ROOT / "bench" / "results"


class Parser(argparse.ArgumentParser):
    """Reads the arguments of ``python -m <command>``; a mistake in them is one line, without the usage."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"python -m {command}", description=description)

    def error(self, message: str) -> NoReturn:
        remedy = "" if ";" in message else f"; see {self.prog} --help"
        self.exit(CANNOT_RUN, f"{self.prog}: error: {message}{remedy}\n")

    def add_out(self, default: Path) -> None:
        """Adds ``--out``, the folder of the results; by default that of those that are committed."""
        self.add_argument("--out", type=new_folder, help=f"folder of the results; default: {default.relative_to(ROOT)}")
        self._results = default

    def out(self, arguments: argparse.Namespace, *settings: str) -> Path:
        """Returns the folder of the results. The default one is kept for the defaults of ``settings``.

        What is committed there would otherwise be replaced by figures of another measurement.
        """
        others = [name for name in settings if str(getattr(arguments, name)) != str(self.get_default(name))]
        if arguments.out is None and others:
            found = f"found --{others[0].replace('_', '-')} with another value; add --out FOLDER"
            self.error(f"expected the default settings for the results in {self._results.relative_to(ROOT)}, {found}")
        return arguments.out or self._results


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a command and exits with what it returns; what a user can mend is one line and `CANNOT_RUN`."""
    try:
        code = main()
    except (CloraError, argparse.ArgumentTypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = CANNOT_RUN
    sys.exit(code)


def whole(least: int = 1, most: int = 10**6) -> Callable[[str], int]:
    """Returns a type of whole numbers; the upper bound catches what no machine would end or hold."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, found {text!r}")
        return number

    return read


def duration(text: str) -> float:
    """Reads a number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < inf:  # not a number is refused too
        raise argparse.ArgumentTypeError(f"expected seconds, a number above 0, found {text!r}")
    return number


def new_folder(text: str | Path) -> Path:
    """Reads a folder that exists or can be made."""
    path = Path(text)
    # Of os.path, which finds no path too long.
    there = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(there):
        raise argparse.ArgumentTypeError(f"expected a folder, found the file {there}; name another folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"expected a folder to write to, found no permission for {there}; name another"
        )
    return path


def device_here(text: str) -> torch.device:
    """Reads a device that this machine has: ``cpu``, ``cuda`` or ``cuda:0`` and so on."""
    kind, _, index = text.partition(":")
    if text != "cpu" and not (kind == "cuda" and (text == kind or index.isdecimal())):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:0 and so on, found {text!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise argparse.ArgumentTypeError(f"expected a GPU for {text!r}, found {count} CUDA devices; use --device cpu")
    return torch.device(text)


def require_gpu(wanted: torch.device) -> None:
    """Refuses a GPU that this machine does not have.

    Raises:
        CloraError: there is none.
    """
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise CloraError("expected a GPU, found no CUDA device, nothing was run; pytest bench runs the cases for CPUs")


def default_device() -> str:
    """Returns the name of the device that is used where none is named."""
    return "cuda" if torch.cuda.is_available() else "cpu"
