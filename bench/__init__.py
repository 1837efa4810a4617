"""Benchmarks of clora's ops; not installed. `python -m bench.gpu` on a GPU machine, `pytest bench` anywhere."""

from clora.heap import keep_freed_memory
from clora.threads import limit_spinning

# As the command `clora` does, before a module of this package imports torch.
limit_spinning()
keep_freed_memory()
