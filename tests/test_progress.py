"""Progress in a terminal and in plain lines, and libraries that keep their own to themselves."""

from __future__ import annotations

import io
import re

import diffusers.utils.logging
import huggingface_hub.utils
import pytest
import transformers.utils.logging
from rich.console import Console

from clora.errors import CloraError
from clora.models.loading import load_pipeline
from clora.progress import quiet_libraries, stage


@pytest.fixture
def console():
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_progress_in_plain_lines(console, monkeypatch):
    monkeypatch.setattr("clora.progress.PLAIN_SECONDS", 0.0)
    with stage("training [x]", 4, console) as advance:
        advance(2, loss=0.5)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "training [x] ..."
    assert re.fullmatch(r"training \[x\]: 2/4 \(50%\), 0:00, eta 0:00 loss 0.5", lines[1])
    assert re.fullmatch(r"training \[x\]: done in \d+\.\d s", lines[2])


def test_progress_is_sparse_and_shows_a_failure(console):
    def work():
        with stage("load", None, console) as advance:
            for _ in range(100):
                advance()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    first, last = console.file.getvalue().splitlines()
    assert first == "load ..."
    assert last.startswith("load: stopped after")


def shown(width, title, total, done, **values):
    """Returns the last lines that a terminal of this width shows."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with stage(title, total, console) as advance:
        advance(done, **values)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return text[text.rindex(title[:5]) :].splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_figures_stay_in_a_narrow_terminal(width):
    """However long the title, and however many values there are: these have a line of their own."""
    values = {"loss": 0.25, "distribution_matching": 1.2345, "critic": 0.3, "learning_rate": 1e-4, "gradient_norm": 3.0}
    line, *below = shown(width, "distil into my-collection-of-fifty-effects", 500_000, 125_000, **values)
    assert len(line) <= width
    for figure in ("━━━", "25%", "125000/500000", "eta -:--:--"):
        assert figure in line
    assert "loss" not in line
    assert "loss 0.25" in below[0]
    assert all(name.replace("_", " ") in " ".join(below) for name in values)


def test_a_stage_without_a_total_does_not_pretend():
    (line,) = shown(80, "load the pipeline", None, 3)
    assert re.fullmatch(r"load the pipeline \S 0:00:00 *", line)


def test_libraries_are_quiet_while_a_pipeline_loads_and_as_before_afterwards(tiny_folder, capfd):
    """Their bars would mix with the stage's own."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)

    def state():
        return [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]

    before = state()
    assert all(shown for _, shown in before), "else this test shows nothing"
    load_pipeline(str(tiny_folder), "cpu")
    assert capfd.readouterr() == ("", "")
    assert state() == before
    with quiet_libraries():
        for library in libraries:
            library.get_logger(f"{library.__name__.partition('.')[0]}.some").warning("careful")
        assert not huggingface_hub.utils.are_progress_bars_disabled(), "a download is long"
    assert capfd.readouterr() == ("", "")
    with pytest.raises(CloraError), quiet_libraries():
        raise CloraError
    assert state() == before
