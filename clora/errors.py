"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class CloraError(ValueError):
    """A mistake in the user's input, told in full by its message.

    The message names what was expected, what was found (file, key, shape) and what to do. The command line prints it
    without a traceback.
    """


@contextmanager
def about(setting: str) -> Iterator[None]:
    """Begins the message of a CloraError that is raised inside with the setting that it is about."""
    try:
        yield
    except CloraError as error:
        raise CloraError(f"{setting}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests known names for a mistyped one.

    Args:
        name: what the user wrote.
        known: every valid name.

    Returns:
        ``"; did you mean 'a' or 'b'?"``, or an empty string where nothing is close; made to end a message.
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
