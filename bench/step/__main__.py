"""`python -m bench.step` is `python -m bench.step.run`."""

from bench.arguments import run
from bench.step.run import main

run(main)
