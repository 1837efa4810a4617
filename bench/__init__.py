"""Benchmarks of clora's ops; not installed. `python -m bench.gpu` on a GPU machine, `pytest bench` anywhere."""

from clora.threads import limit_spinning

limit_spinning()  # before a module of this package imports torch
