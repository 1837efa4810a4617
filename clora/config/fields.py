"""The kinds of values that config files hold."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from clora.files import user_path

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


class FrozenModel(BaseModel):
    """A section of a file: it cannot be changed, has no unknown keys, and its numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class UserPath(str):
    """A path with ``~`` expanded, which is dumped as the user wrote it.

    Checkpoints and collections compare and hash the dump: a run in another home folder is still the same run.

    Args:
        written: the path in the config; a hub id stays as it is.

    Raises:
        CloraError: the path holds a zero byte or names an unknown home.
    """

    written: str

    def __new__(cls, written: str) -> UserPath:
        expanded = user_path(written)
        # Only ~ is expanded: a Path would also rewrite ./a//b, and a hub id on Windows.
        path = super().__new__(cls, expanded if written.startswith("~") else written)
        path.written = written
        return path


def expand_home(value: Any) -> Any:
    """Returns a path with ``~`` expanded; where a setting is a path or a list of texts, the list as it is."""
    return UserPath(value) if isinstance(value, str) else value


def as_written(value: Any) -> Any:
    """Returns a path as the user wrote it, any other value as it is."""
    return getattr(value, "written", value)


PathText = Annotated[NonEmpty, AfterValidator(expand_home), PlainSerializer(as_written)]
PathOrTexts = Annotated[tuple[NonEmpty, ...] | NonEmpty, AfterValidator(expand_home), PlainSerializer(as_written)]
