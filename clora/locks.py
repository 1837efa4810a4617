"""Locks that the system releases when their process ends, however it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from clora.errors import CloraError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]

LOCK = ".clora-lock"
_WINDOWS_BYTE = 1 << 30  # a locked byte cannot be read there, so that it lies beyond the text


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for one run; it is created, and removed again if nothing was written there.

    Raises:
        CloraError: another run holds it.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / LOCK
    try:
        with _held(path) as file:
            with suppress(OSError):  # on a full disk others do not learn who holds it
                os.truncate(file.fileno(), 0)
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            try:
                yield
            finally:
                # While it is held: whoever opens the name now makes a file of their own.
                with suppress(OSError):
                    path.unlink()
    finally:
        for empty in created:
            with suppress(OSError):
                empty.rmdir()


@contextmanager
def shared(folder: Path, clean: Callable[[Path], None]) -> Iterator[None]:
    """Marks a folder as in use by this run, beside others.

    Args:
        folder: created where it is missing.
        clean: called with the folder where no other run uses it. Without POSIX locks it is never called.
    """
    if fcntl is None:
        yield
        return
    with _opened(folder / LOCK) as file:
        if _acquire(file):
            clean(folder)
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(file, fcntl.LOCK_SH)
        yield


def _held(path: Path) -> IO[str]:
    """Opens a lock's file and takes the lock."""
    while True:
        file = _opened(path)
        if not _acquire(file):
            holder = file.read().strip() or "which has just started"
            file.close()
            raise CloraError(
                f"{path.parent} is in use by another run ({holder}); wait until it ends, or name another output"
            )
        # The one who held it before may have removed the file after it was opened here.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link in its place is not followed.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        return os.fdopen(os.open(path, flags, 0o666), "r+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise CloraError(f"{path} cannot be written: {error.strerror}; choose another folder") from error


def _acquire(file: IO[str]) -> bool:
    """Takes an exclusive lock; false where another process has one. A file system without locks gives none."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt is not None:
            file.seek(_WINDOWS_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # not supported here
        return True
    return True
