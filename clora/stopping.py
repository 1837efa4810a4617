"""Requests to stop a run: Ctrl-C, the signals of schedulers and closed terminals, a time limit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

OUT_OF_TIME = 75
"""Exit code of a run that its time limit has stopped: EX_TEMPFAIL, "try again", of sysexits.h."""
# Windows lacks some.
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_ALARM = getattr(signal, "SIGALRM", None)


class Stopped(SystemExit):
    """A run has stopped before its end, as it was asked to; ``code`` is the exit code of the command."""


class StopRequest:
    """Whether a run is to stop; nobody asks for that outside `stop_requests`.

    A request stops the run at once, as Ctrl-C does everywhere, except inside `gently`.

    Args:
        seconds: the time limit, from now on; None for none.
    """

    def __init__(self, seconds: float | None = None):
        self.signal: int | None = None
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._is_gentle = False

    @property
    def is_requested(self) -> bool:
        """Reports a signal, or that the time is over."""
        return self.signal is not None or (self._deadline is not None and time.monotonic() >= self._deadline)

    @contextmanager
    def gently(self) -> Iterator[None]:
        """Lets the block run to its end after a request, which stops the run then; a second Ctrl-C stops it at once.

        Raises:
            KeyboardInterrupt, Stopped: as `stop`, after the block.
        """
        self._is_gentle = True
        try:
            yield
        finally:
            self._is_gentle = False
        if self.is_requested:
            self.stop()

    def stop(self) -> NoReturn:
        """Ends the run.

        Raises:
            KeyboardInterrupt: Ctrl-C was the request.
            Stopped: another signal, or the time limit.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(OUT_OF_TIME if self.signal is None else 128 + self.signal)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        again = self.signal is not None
        if number != _ALARM and not (again and number != signal.SIGINT):
            self.signal = number
        if not self._is_gentle or (again and number == signal.SIGINT):
            self.stop()
        if number == signal.SIGINT:
            # Past Python's buffers, which may be in the middle of a line.
            with suppress(OSError):
                os.write(2, b"\nstopping after this update; Ctrl-C again stops at once and loses what is not saved\n")


@contextmanager
def stop_requests(seconds: float | None) -> Iterator[StopRequest]:
    """Turns signals and a time limit into a request, and restores the signals' handlers at the end.

    Signals that are ignored stay so, as under nohup. Outside the main thread, the only one that has handlers, no signal is
    noticed, and the time limit only by who asks.

    Args:
        seconds: the time limit; None for none.
    """
    request = StopRequest(seconds)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    signals = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    if seconds is not None and _ALARM is not None:
        signals.append(_ALARM)
    before = {number: signal.signal(number, request.receive) for number in signals}
    try:
        if _ALARM in before:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield request
    finally:
        if _ALARM in before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
