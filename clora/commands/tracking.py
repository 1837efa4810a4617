"""A run's numbers in the tracker that people use already, through accelerate: TensorBoard, Weights & Biases, Trackio, ...

Keys and addresses are those that the tracker takes from its own environment; a config holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from clora.errors import CloraError, nearest

Log = Callable[[int, Mapping[str, float]], None]
"""``log(update, values)``."""
PACKAGES = {"comet_ml": "comet-ml"}
"""Packages whose name is not the tracker's."""


def find_tracker(name: str | None) -> str | None:
    """Returns the tracker that ``train.tracker`` names; None for none, and for ``auto`` where TensorBoard is not installed.

    Raises:
        CloraError: accelerate has no such tracker, or it is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name is None:
        return None
    installed = [str(tracker) for tracker in get_available_trackers()]
    if name == "auto":
        return "tensorboard" if "tensorboard" in installed else None
    known = list(LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise CloraError(f"train.tracker: expected auto, null or one of {known}, found {name!r}{nearest(name, known)}")
    if name not in installed:
        raise CloraError(f"train.tracker: {name} is not installed; pip install {PACKAGES.get(name, name)}")
    return name


@contextmanager
def tracked(name: str | None, output: Path, settings: Mapping[str, object]) -> Iterator[Log]:
    """Yields what logs the numbers of a run; one that does nothing without a tracker.

    Args:
        name: from `find_tracker`.
        output: the run's folder. Its name is that of the run; a tracker that writes files does so in ``tracker/`` there.
        settings: of the run, by section.
    """
    if name is None:
        yield lambda update, values: None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    folder = {"logging_dir": output / "tracker"} if kind.requires_logging_directory else {}
    tracker = kind(output.name, **folder)
    if hasattr(tracker, "start"):  # earlier versions of accelerate begin by themselves
        tracker.start()
    try:
        tracker.store_init_configuration(dict(_flat(settings)))
        yield lambda update, values: tracker.log(dict(values), step=update)
    finally:
        tracker.finish()


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str | int | float | bool]]:
    """Yields the settings as trackers take them, such as ``train.updates``; lists, among them the effects, as text."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, str | int | float | bool):
            yield f"{prefix}{key}", value
        elif value is not None:
            yield f"{prefix}{key}", str(value)
