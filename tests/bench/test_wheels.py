"""The packages that a machine without a network lacks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from bench import wheels
from bench.machine import ROOT
from clora.errors import CloraError

TABLE = json.loads(wheels.TABLE.read_text())


def without(*absent, **other):
    """Versions as installed by the table, but for packages that are absent or of another version."""

    def installed(name):
        if name in absent:
            raise PackageNotFoundError(name)
        return other.get(name.replace("-", "_")) or TABLE[name]["version"]

    return installed


def test_nothing_is_missing_where_the_tests_run():
    assert wheels.missing() == []


def test_what_a_missing_package_needs_is_named_with_it():
    found = wheels.missing(without("pydantic", "pydantic-core", "annotated-types", typing_extensions="4.12.0"))
    assert [line.partition("==")[0] for line in found] == [
        "annotated-types",
        "pydantic",
        "pydantic-core",
        "typing-extensions",
    ]
    assert f"pydantic=={TABLE['pydantic']['version']}" in found


def test_what_is_too_old_is_named():
    assert wheels.missing(without(peft="0.10")) == [f"peft=={TABLE['peft']['version']}"]


def test_everything_is_missing_on_a_bare_machine():
    assert len(wheels.missing(without(*TABLE))) == len(TABLE) - 1


def test_packages_are_compared_without_packaging_too():
    program = (
        "import sys; sys.modules['packaging'] = None\n"
        "from bench import wheels\n"
        "def installed(name):\n"
        "    if name == 'packaging': raise wheels.PackageNotFoundError\n"
        "    return wheels.version(name)\n"
        "print(*wheels.missing(installed))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"packaging=={TABLE['packaging']['version']}"


def test_one_message_names_all_and_both_commands():
    message = wheels.advice(["a==1", "b==2"])
    assert message.startswith("missing here: a==1, b==2\n")
    assert "-d wheels a==1 b==2" in message
    assert "pip install --no-index --no-deps" in message


def test_a_package_that_is_not_installed_is_one_error_and_the_table_stays(tmp_path, monkeypatch):
    def requires(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheels, "requires", requires)
    monkeypatch.setattr(wheels, "TABLE", tmp_path / "wheels.json")
    with pytest.raises(CloraError, match="expected all packages .* found no .*; pip install"):
        wheels.main([])
    assert not wheels.TABLE.exists()


def test_the_table_is_that_of_the_tested_versions():
    """`python -m bench.wheels` writes it; setup.py or constraints.txt has changed since, where this fails."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, pin in pins.items():
        entry = TABLE.get(name.replace("_", "-").lower())
        assert entry is None or entry["version"] == pin, name
    needs = wheels.described()["clora"]["needs"]
    assert TABLE["clora"]["needs"] == needs
    if any(version(name) != TABLE[name]["version"] for name in TABLE.keys() - {"clora"} if _is_installed(name)):
        pytest.skip("this environment has other versions than constraints.txt")
    assert wheels.described() == TABLE


def _is_installed(name):
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
