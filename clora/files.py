"""Files that are either whole or missing, and output folders that are checked before the work starts."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clora.errors import CloraError

TEMPLATES = Path(__file__).parent / "templates"
"""Files that ship with clora: the example config, everyday edits, the model card, the report."""
MAX_TEXT = 64_000_000
"""Bytes of a text file; what people write and what describes the largest model are smaller."""

_MAKE_ROOM = "make room there; the same command goes on with what is kept"
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: "allow files of that size there (ulimit -f); the same command goes on with what is kept",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside a file; the block's result there takes the file's place at the end.

    No reader ever sees half of a file, and an error in the block leaves the old one. The folder is created where it is
    missing. The result is on the disk before it takes its name, so that a loss of power leaves the old or the new file.

    Raises:
        CloraError: the block or the renaming raises an error of the system (`system_error`).
    """
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder that only we may enter and whose name nobody can foresee, so that no link redirects the file. The
        # file itself gets the rights that the umask gives.
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        temporary = folder / path.name
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except Exception as error:
        found = system_error(error)
        if found is None:
            raise
        remedy = _REMEDIES.get(found.errno, "choose another output folder")
        raise CloraError(f"{path} cannot be written: {found.strerror or found}; {remedy}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def system_error(error: Exception) -> OSError | None:
    """Returns the system's error that an exception is or states: safetensors and tokenizers raise their own.

    Args:
        error: any exception.

    Returns:
        None for errors that are not the system's.
    """
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Removes a file, if it is there, and waits until that is on the disk.

    Raises:
        OSError: it cannot be removed.
    """
    if path.exists() or path.is_symlink():
        path.unlink()
        _flush(path.parent)


def remove_orphans(folder: Path, names: str) -> None:
    """Removes what runs that were killed left of `replacing`; the caller makes sure that no other run writes there.

    Args:
        folder: it may be missing; its subfolders are not looked at.
        names: regular expression of the files that were to be written.
    """
    # Earlier versions made files of this form, now they are folders.
    orphan = re.compile(rf"\.({names})\.\w+\.tmp")
    for path in folder.iterdir() if folder.is_dir() else ():
        if not orphan.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file as a whole (see `replacing`).

    Args:
        path: the file; its folder is created where it is missing.
        content: its bytes, or text written as UTF-8.

    Raises:
        CloraError: it cannot be written.
    """
    with replacing(Path(path)) as file:
        file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def read_text(path: Path, expected: str) -> str:
    """Reads a user's text file.

    Args:
        path: the file.
        expected: its kind, for messages: "a YAML file".

    Raises:
        CloraError: it is missing, a folder, not UTF-8, or cannot be read.
    """
    try:
        check_regular(path, expected)
        if path.stat().st_size > MAX_TEXT:
            raise CloraError(f"{path}: expected {expected}, found {path.stat().st_size} bytes; name another file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CloraError(f"{path} does not exist; expected {expected}. Check the path") from error
    except UnicodeDecodeError as error:
        raise CloraError(
            f"{path}: expected {expected}, found no UTF-8 text; name another or save it as UTF-8"
        ) from error
    except OSError as error:
        found = "a folder; name the file in it" if path.is_dir() else f"{error.strerror}; make the file readable"
        raise CloraError(f"{path}: expected {expected}, found {found}") from error


def check_regular(path: Path, expected: str) -> None:
    """Refuses a device, whose content may have no end, and a pipe, which is waited for; what is missing passes.

    Raises:
        CloraError: the path is neither a file nor a folder.
        OSError: it cannot be looked at.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CloraError(f"{path}: expected {expected}, found a device or a pipe; name a file")


def check_writable(folder: str | Path) -> Path:
    """Checks, before long work starts, that its results can be written; leaves nothing behind.

    Args:
        folder: the output folder; it may be missing and stays so.

    Returns:
        The folder as a path.

    Raises:
        CloraError: it is a file, cannot be created, or does not accept files.
    """
    folder = user_path(folder).absolute()
    missing: list[Path] = []
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise CloraError(f"output folder {folder} is a file; choose another output folder") from error
    except OSError as error:
        message = f"output folder {folder} cannot be written: {error.strerror or error}"
        raise CloraError(f"{message}; choose another output folder") from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()
    return folder


def user_path(path: str | Path) -> Path:
    """Returns the path with ``~`` as the home folder.

    Raises:
        CloraError: no such home, or no system could have such a path.
    """
    if "\0" in str(path):
        raise CloraError(f"expected a path, found {str(path)!r} with a zero byte in it")
    try:
        found = Path(path).expanduser()
        os.lstat(found)
    except RuntimeError as error:
        raise CloraError(f"{path}: {error}; write the path in full") from error
    except UnicodeEncodeError as error:
        raise CloraError(f"expected a path, found {str(path)!r}, which is no text") from error
    except OSError as error:  # of a path that is missing, which may be right, or that no system takes
        if error.errno == errno.ENAMETOOLONG:
            raise CloraError(
                f"expected a path, found a name of {len(str(path))} characters, {str(path)[:60]}..."
            ) from error
    return found
