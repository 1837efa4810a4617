"""Small programs rebuilt from public bug reports; each exits with 0 where clora is right."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from helpers import forked

FOLDER = Path(__file__).parent
SECONDS = 120


def run(program: str, folder: str, said: str) -> None:
    """Runs a program as its user does, in this process."""
    forked.write_to(said)
    os.chdir(folder)
    runpy.run_path(program, run_name="__main__")


def refuse_interpreter() -> None:
    """Ends with 1 where Triton's kernels are interpreted."""
    from csrc_triton.registration import INTERPRETED

    sys.exit(INTERPRETED or "TRITON_INTERPRET" in os.environ)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="processes are forked as on POSIX")
def test_programs_run_without_the_interpreter_of_kernels():
    pytest.importorskip("triton")
    process = forked.start(refuse_interpreter)
    process.join(SECONDS)
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="processes are forked as on POSIX")
@pytest.mark.parametrize("program", sorted(file.name for file in FOLDER.glob("case*.py")))
def test_case(program, tmp_path):
    (tmp_path / "work").mkdir()
    process = forked.start(run, str(FOLDER / program), str(tmp_path / "work"), str(tmp_path / "said"))
    process.join(SECONDS)
    said = (tmp_path / "said").read_text("utf-8")
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"{program} takes longer than {SECONDS} s:\n{said}")
    if "Traceback" in said:
        pytest.fail(f"{program} broke before it could judge:\n{said}")
    assert process.exitcode == 0, said
