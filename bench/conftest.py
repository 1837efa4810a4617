"""`pytest bench`: a test measures a case as `bench.worker` does; the table of all of them comes last."""

from __future__ import annotations

import pytest
import torch

from bench.cases import CASES, cpu_cases
from bench.machine import measure_roof
from bench.measure import Bench
from bench.report import figures
from bench.timing import CudaStopwatch, cpu_stopwatch

RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="on a GPU: every case, for hours, not only the telling ones")


def pytest_configure(config):
    config.stash[RECORDS] = []


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        on_gpu = CASES["every" if metafunc.config.getoption("--all") else "telling"]
        cases = on_gpu() if torch.cuda.is_available() else cpu_cases()
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    """The table after everything else."""
    yield
    terminalreporter.write_line(figures(config.stash[RECORDS]))


@pytest.fixture(scope="session")
def bench():
    """The GPU and its clock where there is one, else the CPU's."""
    if not torch.cuda.is_available():
        return Bench(torch.device("cpu"), cpu_stopwatch, None, rounds=10)
    gpu = torch.device("cuda", 0)
    stopwatch = CudaStopwatch(gpu)
    return Bench(gpu, stopwatch, measure_roof(gpu, stopwatch))


@pytest.fixture
def measured(request):
    """The records of the table."""
    return request.config.stash[RECORDS]
