"""Kernels behind `clora.ops`: one folder per op, each with an eager `reference.py` that defines its meaning.

Importing this package needs neither a GPU nor Triton. Use it through `clora.ops`, never directly.
"""
