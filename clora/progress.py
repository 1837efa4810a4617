"""Progress of a long stage: a live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

PLAIN_SECONDS = 10.0
_LIVE_SECONDS = 0.2

Advance = Callable[..., None]


def stage(title: str, total: int | None, console: Console | None = None) -> AbstractContextManager[Advance]:
    """Shows the progress of one stage; stages follow one another, they do not nest.

    ::

        with stage("training", 500) as advance:
            for _ in range(500):
                advance(1, loss=step())

    Args:
        title: the work.
        total: number of steps; None where it is not known.
        console: the place to show it; standard error by default, so that standard output stays clean.

    Returns:
        A context that yields ``advance(n=1, **values)``: n more steps are done; values (numbers or scalar tensors) are
        shown beside the bar. They are turned to numbers only when they are shown, so a tensor on a GPU does not stall
        every step.
    """
    console = console or Console(stderr=True)
    return (_live if console.is_terminal else _plain)(title, total, console)


def say(text: str, console: Console | None = None) -> None:
    """Shows a line, between stages; on standard error by default."""
    (console or Console(stderr=True)).print(Text(text), soft_wrap=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hides loading bars and warnings of diffusers and transformers, which would mix with a stage's own bar.

    Errors are still raised and logged, and downloads keep their bars. At the end every setting is restored.
    """
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as of_transformers

    shows_downloads = not are_progress_bars_disabled()
    with ExitStack() as restored:
        for library in (of_diffusers, of_transformers):
            restored.callback(library.set_verbosity, library.get_verbosity())
            if library.is_progress_bar_enabled():
                restored.callback(library.enable_progress_bar)
            library.set_verbosity_error()
            library.disable_progress_bar()
        if shows_downloads:
            enable_progress_bars()  # transformers has switched these off too
        yield


def up_to(advance: Advance) -> Callable[[int, Mapping[str, Any]], None]:
    """Returns ``report(done, values)``, which advances to ``done``: for work that may be resumed in the middle."""
    shown = 0

    def report(done: int, values: Mapping[str, Any]) -> None:
        nonlocal shown
        advance(done - shown, **values)
        shown = done

    return report


class _TwoLines(Progress):
    """One task, whose values have a line of their own: at 80 columns they would push the time left off the screen."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if values := task.fields["values"]:
                yield Text(values, style="dim")


def _columns(total: int | None, width: int) -> tuple[ProgressColumn, ...]:
    """What a line of this width shows. Of a stage without a total nobody knows which share is done, nor the time left."""
    # A long title is cut before a figure is.
    longest = min(32, max(10, width - 48))
    title = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, max_width=longest))
    if total is None:
        return title, SpinnerColumn(), TimeElapsedColumn()
    bar = BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8, max_width=40))
    return title, bar, TaskProgressColumn(), MofNCompleteColumn(), TextColumn("eta"), TimeRemainingColumn()


@contextmanager
def _live(title: str, total: int | None, console: Console) -> Iterator[Advance]:
    with _TwoLines(*_columns(total, console.width), console=console, expand=total is not None) as progress:
        task = progress.add_task(title, total=total, values="")
        shown = -math.inf

        def advance(n: int = 1, **values: Any) -> None:
            nonlocal shown
            progress.advance(task, n)
            if values and time.monotonic() - shown >= _LIVE_SECONDS:
                shown = time.monotonic()
                progress.update(task, values=_format(values))

        yield advance


@contextmanager
def _plain(title: str, total: int | None, console: Console) -> Iterator[Advance]:
    start = shown = time.monotonic()
    done = 0
    say(f"{title} ...", console)

    def advance(n: int = 1, **values: Any) -> None:
        nonlocal done, shown
        done += n
        now = time.monotonic()
        if now - shown >= PLAIN_SECONDS:
            shown = now
            say(f"{title}: {_position(done, total, now - start)} {_format(values)}".rstrip(), console)

    try:
        yield advance
    except BaseException:
        say(f"{title}: stopped after {time.monotonic() - start:.1f} s", console)
        raise
    say(f"{title}: done in {time.monotonic() - start:.1f} s", console)


def _position(done: int, total: int | None, elapsed: float) -> str:
    if not total or not done:
        return f"{done}, {_duration(elapsed)}"
    remaining = elapsed / done * max(0, total - done)
    return f"{done}/{total} ({done / total:.0%}), {_duration(elapsed)}, eta {_duration(remaining)}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"


def _format(values: dict[str, Any]) -> str:
    return "  ".join(f"{name.replace('_', ' ')} {float(value):.4g}" for name, value in values.items())
