"""Benchmarks of clora's ops; not installed. `python -m bench.run` on a GPU machine, `pytest bench` anywhere."""
