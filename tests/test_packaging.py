"""The installed package: its metadata matches the imports, and importing it costs nothing."""

from __future__ import annotations

import ast
import glob
import pydoc
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import clora

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
# Needed at run time without an import: see the comments in setup.py.
NOT_IMPORTED = {"accelerate"}


@pytest.fixture(scope="module")
def metadata():
    """The arguments that setup.py passes to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", given.update)
        patch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def source_files():
    return [file for package in ("clora", "csrc_triton") for file in (ROOT / package).rglob("*.py")]


def imported_packages():
    """Top-level packages that clora and csrc_triton import, inside functions too."""
    found = set()
    for file in source_files():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"clora", "csrc_triton"}


def test_requirements_are_what_is_imported(metadata):
    required = {canonicalize_name(Requirement(line).name) for line in metadata["install_requires"]}
    imported = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in imported_packages()}
    extras = [metadata["extras_require"][name] for name in ("8bit", "judge")]
    optional = {canonicalize_name(Requirement(line).name) for lines in extras for line in lines}
    assert imported - optional <= required
    assert optional <= imported
    assert required - imported <= NOT_IMPORTED


def test_constraints_pin_every_requirement_within_its_range(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)) for pin in pins}
    assert all(pin.operator == "==" and "+" not in pin.version for pin in pinned.values())
    lists = [metadata["install_requires"], *metadata["extras_require"].values()]
    required = [Requirement(line) for lines in lists for line in lines]
    assert {canonicalize_name(requirement.name) for requirement in required} == set(pinned)
    for requirement in required:
        assert pinned[canonicalize_name(requirement.name)].version in requirement.specifier


def test_every_source_folder_is_packaged(metadata):
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in source_files()}
    assert folders == set(metadata["packages"])


def test_an_editable_install_is_a_path_file(metadata):
    """Type checkers follow no import hook, which setuptools writes for two packages without a stated folder."""
    assert metadata["package_dir"] == {"": "."}


def test_version_and_entry_point(metadata):
    assert metadata["version"] == clora.__version__
    assert metadata["entry_points"] == {"console_scripts": ["clora = clora.cli:main"]}
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_data_files_are_packaged(metadata):
    names = {"clora": ("py.typed", "templates/report.html.j2"), "csrc_triton": ("multi_lora/designs.json",)}
    for package, files in names.items():
        patterns = metadata["package_data"][package]
        kept = {file for pattern in patterns for file in (ROOT / package).glob(pattern)}
        assert {ROOT / package / name for name in files} <= kept


def test_import_is_lazy_and_quick():
    """Under 0.3 s beyond Python, for the command line too; measured as CPU time, which a busy machine does not change."""
    code = (
        "import sys, time; start = time.process_time(); import clora; dir(clora); took = time.process_time() - start\n"
        "import clora.cli\n"
        "print(took, sorted({'torch', 'diffusers', 'transformers', 'triton', 'csrc_triton'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    took, _, loaded = out.strip().partition(" ")
    assert float(took) < 0.3
    assert loaded == "[]"


def test_public_names():
    from clora.config.settings import load_config

    assert clora.load_config is load_config
    assert set(clora.__all__) | {"__version__"} <= set(dir(clora))
    assert not {"importlib", "TYPE_CHECKING"} & set(dir(clora)), "completion offers public names only"
    for name in clora.__all__:
        assert getattr(clora, name).__name__ == name
        assert getattr(clora, name).__doc__, name
    # Since Python 3.13 long signatures have a line for each argument.
    assert re.search(r"distill\(\s*config: ", pydoc.plain(pydoc.render_doc(clora))), "help(clora) shows signatures"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = clora.nothing


def test_public_names_are_the_same_for_type_checkers_python_and_readers():
    """The imports of type checkers, the table of lazy names and the docstring's list agree."""
    tree = ast.parse((ROOT / "clora" / "__init__.py").read_text("utf-8"))
    (branch,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.name: node.module for node in branch.body for alias in node.names}
    assert imported == clora._MODULES
    assert sorted(imported) == clora.__all__
    assert set(re.findall(r"^    (\w+): ", clora.__doc__, re.MULTILINE)) == set(imported)


def test_the_type_checker_covers_the_modules_of_all_public_names():
    listed = re.search(
        r"^\[tool.mypy\]\nfiles = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    modules = {"clora", *clora._MODULES.values()}
    files = {re.sub(r"/__init__$", "", file).replace("/", ".") for file in re.findall(r'"(.+)\.py"', listed[1])}
    assert files == modules


def test_ci_uses_the_same_commands():
    """The README's test command, part by part; CI may only ask for less output."""
    script = (ROOT / ".ci" / "run").read_text()
    (command,) = re.findall(r"^pip install .*&& pytest$", (ROOT / "README.md").read_text(), re.MULTILINE)
    for part in command.split(" && "):
        quiet = re.escape(part).replace("install", "install( --quiet)?", 1)
        assert re.search(rf"^{quiet}( -q)?$", script, re.MULTILINE), part
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_pytest_needs_no_xdist(metadata):
    """The extra `bench` installs what `pytest bench` needs."""
    assert not any("xdist" in line for line in metadata["extras_require"]["bench"])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "tests/test_devices.py",
    ]
    subprocess.run([*command, "-k", "taken_rows"], cwd=ROOT, check=True, capture_output=True)


def test_the_shipped_studio_fits_and_is_packaged(metadata):
    assets = ROOT / "clora" / "studio" / "assets"
    files = [file for file in assets.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 64e6
    patterns = metadata["package_data"]["clora"]
    found = {file for pattern in patterns for file in glob.glob(pattern, root_dir=ROOT / "clora", recursive=True)}
    assert {str(file.relative_to(ROOT / "clora")) for file in files} | {"studio/making/outlines.json"} <= found
