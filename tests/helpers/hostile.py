"""Hostile files: odd values in trees, damaged bytes, and the bounds within which clora has to answer."""

from __future__ import annotations

import copy
import json
import re
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clora.errors import CloraError

PATHS = ("/dev/zero", "/dev/null", "/dev", "/proc/self/mem", "/", ".", "..", "loop", "pipe", "missing", "photos")
PATHS += ("a.safetensors", "lines.txt", "~nobody/x", "x" * 300, "a/" * 3000, "photos/0.png/x", "a\0b", "\udcff", "me/x")
NUMBERS = (0, -1, 1, 2, 7, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e-300, 1e-320, 1e38, 1e300, -1e308)
NUMBERS += (float("inf"), float("-inf"), float("nan"))
OTHERS = (None, True, False, "", " ", "auto", "stock", "cuda:1", "1", "\x1b[2J", "[bold]", "{x}", "%s", "é" * 50)
OTHERS += ("x" * 10**5, [], [[]], {}, [None], {"x": 1}, {"": {"": []}}, [1] * 1000, "\u202e", "\ud800")
# What only a file's text can say, YAML's and JSON's; `_Raw` puts it there as it stands.
YAML = ("2001-01-01", "2001-13-99", "!!bool x", "!!timestamp x", "!!binary x", "!!python/name:os.system", "!!omap [x]")
YAML += ("&a [*a]", "*a", "{<<: 1}", "{<<: {a: 1}}", "1:2:3", "0x" + "f" * 5000, "9" * 5000, "1e999", "?", "[" * 2000)
YAML += ("{[1]: 2}", "{null: 1}", "!!set {a}", "!!float x", "!!int ''", "=", "0b", "0o9", "|", "'")
JSON = ("9" * 5000, "1e999", "[" * 5000, "NaN", "{", "", '{"a": 1, "a": 2}', '"\\ud800"', "-" * 9)


class _Raw(str):
    """Text that stands in a file as it is."""


def odd(raw: tuple[str, ...]) -> st.SearchStrategy:
    """Values that nobody would write; ``raw`` are those of the file's own language."""
    return st.sampled_from([*PATHS, *NUMBERS, *OTHERS, *map(_Raw, raw)])


def _places(tree: Any, place: tuple = ()) -> Iterator[tuple]:
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*place, key)
        yield from _places(tree[key], (*place, key))


@st.composite
def edited(draw, tree: Any, raw: tuple[str, ...]) -> Any:
    """A tree with one to three values replaced, removed, or put under another key."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from([*_places(tree)] or [(0,)]))
        node = tree
        for part in above:
            node = node[part]
        if not node:
            continue
        edit = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if edit == "replace":
            node[key] = copy.deepcopy(draw(odd(raw)))  # a later edit may change it
        elif edit == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.sampled_from(["", "x", "name", "a.b", "\u202e", f"{key}s", "9" * 5000]))] = node.pop(key)
    return tree


def dumped(tree: Any, dump: Callable[[Any], str]) -> bytes:
    """The text of a tree, with what is raw in it as it stands."""
    raw: list[str] = []

    def marked(value: Any) -> Any:
        if isinstance(value, _Raw):
            raw.append(value)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: marked(entry) for key, entry in value.items()}
        return [marked(entry) for entry in value] if isinstance(value, list) else value

    text = dump(marked(tree))
    return re.sub(r"""['"]?@raw(\d+)@['"]?""", lambda match: raw[int(match[1])], text).encode("utf-8", "surrogatepass")


def as_yaml(tree: Any) -> bytes:
    return dumped(tree, lambda tree: yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))


def as_json(tree: Any) -> bytes:
    return dumped(tree, json.dumps)


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """Bytes with one to four of them flipped, inserted, cut out, or a line repeated."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(found) - 1, 0)))
        edit = draw(st.sampled_from(["flip", "insert", "cut", "end", "line"]))
        if edit == "flip" and found:
            found[at] ^= draw(st.integers(1, 255))
        elif edit == "insert":
            found[at:at] = draw(st.one_of(st.binary(max_size=8), st.sampled_from([b"\0", b"\t", b"&a ", b"*a", b": "])))
        elif edit == "cut":
            del found[at : at + draw(st.integers(1, 40))]
        elif edit == "end":
            del found[at:]
        else:
            found[at:at] = found[: found.find(b"\n") + 1]
    return bytes(found)


@contextmanager
def bounded(seconds: float = 10, megabytes: int = 2000) -> Iterator[None]:
    """Raises TimeoutError or MemoryError where the block takes more, beyond what the process has already.

    Time is the process's own: other work on the machine does not count.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"longer than {seconds} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def expect_own_errors(read: Callable[[], object]) -> None:
    """Calls a reader: within bounds it ends, or raises a CloraError of a length that a person reads."""
    message = ""
    with bounded():
        try:
            read()
        except CloraError as error:
            message = str(error)
    assert len(message) < 20_000, message[:200]


def fuzz(cases: st.SearchStrategy, check: Callable[[Any], None], count: int, derandomize: bool) -> None:
    """Checks ``count`` cases; the same ones each time if ``derandomize``."""

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=derandomize,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def run(case: Any) -> None:
        check(case)

    run()
