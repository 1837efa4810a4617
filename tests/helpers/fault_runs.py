"""Runs of the command line as processes of their own, with a fault at a chosen place of their writing.

A place is an operation on a file below a folder that a run writes to: opened, renamed, removed, created. Python reports each
to audit hooks before it happens, so that equal runs have equal places.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from helpers import forked

OPERATIONS = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"})
SECONDS = 120


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Attributes:
        place: the number of the place, from 0, that it happens at; None for never.
        signals: sent to the run there, one after the other.
        is_torn: True if the half-written file that is newest is cut to half of its size first, as it is in the middle
            of a write.
        waits: True if the run waits there until it is told to go on (`Run.go_on`).
        largest: the largest file that it may write, in bytes.
        within: only places with this in their path count.
    """

    place: int | None = None
    signals: tuple[int, ...] = ()
    is_torn: bool = False
    waits: bool = False
    largest: int | None = None
    within: str = ""


@dataclass(frozen=True)
class Run:
    """A run that was started.

    Attributes:
        process: its process.
        record: a folder with its output (``said``), its places (``places``) and the marks of a run that waits.
    """

    process: multiprocessing.Process
    record: Path

    def end(self) -> int:
        """Waits until it ends; returns its exit code, negative where a signal has killed it."""
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, f"no end in {SECONDS} s: {self.said}"
        return self.process.exitcode

    @property
    def said(self) -> str:
        return (self.record / "said").read_text("utf-8")

    @property
    def places(self) -> list[str]:
        """The operation and the path of each place of a run without a fault, such as ``os.rename out/README.md``."""
        return (self.record / "places").read_text("utf-8").splitlines()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Waits for something that the run does."""
        start = time.monotonic()
        while not reached():
            assert self.process.is_alive(), self.said
            assert time.monotonic() < start + SECONDS, self.said
            time.sleep(0.01)

    def wait_for_its_place(self) -> None:
        """Waits until it waits at its place."""
        self.wait_until((self.record / "waits").exists)

    def go_on(self) -> None:
        """Lets a run that waits go on."""
        (self.record / "goes on").touch()


@dataclass
class Runs:
    """Starts runs.

    Attributes:
        folder: places are the operations on files below it.
        records: of the runs.
        started: all runs.
    """

    folder: Path
    records: Path
    started: list[Run] = field(default_factory=list)

    def start(self, arguments: Sequence[object], fault: Fault | None = None) -> Run:
        """Starts ``clora ARGUMENTS`` with a fault."""
        record = self.records / str(len(self.started))
        record.mkdir(parents=True)
        words = [str(argument) for argument in arguments]
        process = forked.start(_run, words, str(self.folder), str(record), fault or Fault())
        self.started.append(Run(process, record))
        return self.started[-1]

    def run(self, arguments: Sequence[object], fault: Fault | None = None) -> tuple[int, str]:
        """Starts ``clora ARGUMENTS``, waits for its end and returns its exit code and what it said."""
        run = self.start(arguments, fault)
        return run.end(), run.said

    def close(self) -> None:
        """Ends the runs that still go on."""
        for run in self.started:
            run.process.kill()
            run.process.join()


def _run(words: Sequence[str], folder: str, record: str, fault: Fault) -> None:
    """The command line as a shell starts it, in this process."""
    forked.write_to(f"{record}/said")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Records are opened before places count.
    sys.addaudithook(Hook(folder, record, fault))
    if fault.largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest, fault.largest))
    from clora.cli import main

    sys.argv = ["clora", *words]
    main()


class Hook:
    """Counts and records the places of a process, and brings the fault about at its own."""

    def __init__(self, folder: str, record: str, fault: Fault):
        self.folder = folder + os.sep
        self.record = Path(record)
        self.fault = fault
        self.count = 0
        self.places = os.open(self.record / "places", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path = os.path.abspath(os.fspath(arguments[1 if event == "os.rename" else 0]))
        is_read = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_read or not path.startswith(self.folder):
            return
        if self.fault == Fault():
            os.write(self.places, f"{event} {path.removeprefix(self.folder)}\n".encode())
        if self.fault.within not in path:
            return
        place, self.count = self.count, self.count + 1
        if place == self.fault.place:
            self._strike()

    def _strike(self) -> None:
        if self.fault.is_torn:
            tear(Path(self.folder))
        for number in self.fault.signals:
            os.kill(os.getpid(), number)
        if self.fault.waits:
            (self.record / "waits").touch()
            while not (self.record / "goes on").exists():
                time.sleep(0.01)


def tear(folder: Path) -> None:
    """Cuts the newest of the files that are being written to half of its size."""
    files = [path for path in folder.rglob(".*.tmp/*") if path.is_file()]
    if files:
        newest = max(files, key=lambda file: file.stat().st_mtime_ns)
        os.truncate(newest, newest.stat().st_size // 2)
