"""Errors that a user can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MAX_MESSAGE = 10_000


class CloraError(ValueError):
    """A mistake in the user's input, with a message that is enough to mend it.

    The message names the expected, the found (file, key, shape) and the remedy. The command line prints it without a
    traceback. Of one that is too long for a person, since a file's name or value is, the middle is left out.
    """

    def __init__(self, message: object = ""):
        text = str(message)
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1000]} ... {text[-1000:]}")


def check_device_name(device: str) -> None:
    """Refuses a name that no device has; it is here because configs are checked without importing torch.

    Raises:
        CloraError: it is none of ``auto``, ``cpu``, ``mps``, ``cuda`` and ``cuda:0`` and so on.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:0|:[1-9]\d*)?", device):
        raise CloraError(f"device: expected auto, cpu, mps, cuda or cuda:0 and so on, found {device!r}")


@contextmanager
def about(setting: str) -> Iterator[None]:
    """Prefixes the message of a CloraError that is raised inside with the setting that caused it."""
    try:
        yield
    except CloraError as error:
        raise CloraError(f"{setting}: {error}") from error


def listed(problems: Sequence[str], limit: int = 40) -> str:
    """Returns the number of problems and the first of them, one on each line."""
    rest = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return "\n  ".join([f"{len(problems)} problems", *problems[:limit], *rest])


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests known names for a mistyped one.

    Args:
        name: the user's spelling.
        known: every valid name.

    Returns:
        ``"; did you mean 'a' or 'b'?"``, the end of a message, or an empty string where nothing is close.
    """
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""


def printable(text: str) -> str:
    """Returns text with escapes for the control characters, by which a file's names could command a terminal."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )
