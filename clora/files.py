"""Files that are either whole or not there, and output folders checked before the work starts."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from clora.errors import CloraError

TEMPLATES = Path(__file__).parent / "templates"
"""Files that ship with clora: the example config, everyday edits, the model card, the report."""


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file under a temporary name and renames it, so that no reader ever sees half of it.

    Args:
        path: the file; its folder is created where it is missing.
        content: its bytes, or text written as UTF-8.

    Raises:
        CloraError: it cannot be written.
    """
    path = Path(path)
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise CloraError(
            f"{path} cannot be written: {error.strerror or error}; choose another output folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder: str | Path) -> Path:
    """Makes sure, before long work starts, that its results can be written; leaves nothing behind.

    Args:
        folder: the output folder; it may be missing, what writes into it creates it.

    Returns:
        The folder as a path.

    Raises:
        CloraError: it is a file, cannot be created, or nothing can be written in it.
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
            with contextlib.suppress(OSError):
                path.rmdir()
    return folder


def user_path(path: str | Path) -> Path:
    """The path with ``~`` as the home folder.

    Raises:
        CloraError: no such home, or no system could have such a path.
    """
    if "\0" in str(path):
        raise CloraError(f"expected a path, found {str(path)!r} with a zero byte in it")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise CloraError(f"{path}: {error}; write the path in full") from error
