"""Paths as a user writes them."""

from __future__ import annotations

from pathlib import Path

from clora.errors import CloraError


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
