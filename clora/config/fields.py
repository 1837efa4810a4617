"""The kinds of values that config files hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationInfo

from clora.files import user_path

# What is beyond a bound is a slip of the pen, and would end in an overflow or without memory hours later.
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
NotNegative = Annotated[float, Field(ge=0, le=1e6)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
Few = Annotated[int, Field(ge=1, le=10_000)]
"""Rows of a batch, or texts that are written for one effect."""
Rank = Annotated[int, Field(ge=1, le=16_384)]
Steps = Annotated[int, Field(ge=1, le=1000)]
Pixels = Annotated[int, Field(ge=1, le=65_536)]
Tokens = Annotated[int, Field(ge=1, le=1_000_000)]
Shift = Annotated[float, Field(ge=1e-3, le=1000)]
"""Beyond these all noise levels round to 0 or 1."""
Rate = Annotated[float, Field(gt=0, le=1000)]
"""A learning rate; a larger one is a slip of the pen, and its steps would overflow."""
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1, pattern=r"\S")]


class FrozenModel(BaseModel):
    """A section of a file: it cannot be changed, has no unknown keys, and its numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Reading(NamedTuple):
    """The context in which a config is checked.

    Attributes:
        folder: the one that its relative paths are relative to; the working directory where there is no context.
        is_filled: its prompts file has been read.
    """

    folder: Path
    is_filled: bool = True


class UserPath(str):
    """A path from the config's folder, with ``~`` expanded, which is dumped as JSON as the user wrote it.

    Checkpoints and collections compare and hash that: a run in another home folder or working directory is still the same.

    Args:
        written: the path in the config.
        folder: the config's own.

    Raises:
        CloraError: the path holds a zero byte or names an unknown home.
    """

    written: str

    def __new__(cls, written: str, folder: Path = Path()) -> UserPath:
        expanded = user_path(written)
        if written.startswith("~"):
            found = str(expanded)
        else:
            # A Path would rewrite ./a//b; the working directory needs no name.
            found = written if folder == Path() else os.path.join(folder, written)
        path = super().__new__(cls, found)
        path.written = written
        return path


def from_folder(value: Any, info: ValidationInfo) -> Any:
    """Returns a path from the config's folder; where a setting is a path or a list of texts, the list as it is."""
    if not isinstance(value, str):
        return value
    return UserPath(value) if info.context is None else UserPath(value, info.context.folder)


def from_folder_or_hub(value: str, info: ValidationInfo) -> str:
    """Returns a path from the config's folder if it exists there, any other text, such as a hub id, as it is."""
    path = from_folder(value, info)
    return path if os.path.exists(path) else UserPath(value)


def as_written(value: Any) -> Any:
    """Returns a path as the user wrote it, any other value as it is."""
    return getattr(value, "written", value)


AS_WRITTEN = PlainSerializer(as_written, when_used="json")
PathText = Annotated[NonEmpty, AfterValidator(from_folder), AS_WRITTEN]
PathOrHubId = Annotated[NonEmpty, AfterValidator(from_folder_or_hub), AS_WRITTEN]
PathOrTexts = Annotated[tuple[NonEmpty, ...] | NonEmpty, AfterValidator(from_folder), AS_WRITTEN]
