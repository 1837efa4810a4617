"""Small programs rebuilt from public bug reports; each exits with 0 where clora is right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted(file.name for file in FOLDER.glob("case*.py")))
def test_case(program, tmp_path):
    # As a user runs it: the interpreter of Triton is for the tests of the kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, FOLDER / program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    if "Traceback" in run.stderr:
        pytest.fail(f"{program} broke before it could judge:\n{run.stdout}{run.stderr}")
    assert run.returncode == 0, run.stdout + run.stderr
