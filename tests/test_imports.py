"""The order of imports: every module may use its own layer and those below, never one above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up; a name stands for the module and everything in it.
LAYERS = (
    {"clora.backend", "clora.errors", "clora.hub", "clora.ops", "clora.paths", "clora.transfer"},
    {
        "clora.atomic",
        "clora.cache",
        "clora.checkpoint",
        "clora.fingerprint",
        "clora.flow_matching",
        "clora.lora",
        "clora.muon",
        "clora.optimizers",
        "clora.progress",
        "clora.readings",
    },
    {
        "clora.collection",
        "clora.config",
        "clora.config_file",
        "clora.drawing",
        "clora.everyday",
        "clora.images",
        "clora.prompt_file",
        "clora.report",
    },
    {"clora.conditioning"},
    {"clora.models", "clora.sampling"},
    {
        "clora.adapter_bank",
        "clora.encoders",
        "clora.generation",
        "clora.objective",
        "clora.prompt_table",
        "clora.recomputation",
        "clora.rendering",
        "clora.serving",
        "clora.slots",
        "clora.targets",
        "clora.teacher_pages",
    },
    {"clora.studio"},
    {
        "clora.data",
        "clora.demo",
        "clora.distill",
        "clora.effects",
        "clora.encoding",
        "clora.export",
        "clora.finished",
        "clora.lora_training",
        "clora.plan",
        "clora.prompting",
        "clora.samples",
        "clora.student",
        "clora.student_rows",
        "clora.trainer",
    },
    {"clora.cli"},
)
APPLICATIONS = 7
# Modules of a lower package that are themselves applications.
BUILD = ("clora.studio.build", "clora.studio.teachers", "clora.studio.baselines")
UNORDERED = {"clora", "clora.testing"}  # the lazy names, and what only tests use
# Tensors and callables only: these never see a model, a bank or a config.
PURE = ("clora.flow_matching", "clora.objective", "clora.sampling")
PURE_MAY_USE = {"clora.errors", "clora.ops", "clora.flow_matching", "clora.transfer"}


def module_name(file):
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module):
    if module.startswith(BUILD):
        return APPLICATIONS
    for index, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in layer):
            return index
    raise AssertionError(f"{module} stands in no layer: add it to LAYERS")


def imports_of(file):
    """Absolute module names that a file imports, inside functions too, but not those for type checkers alone."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in inner)


def is_module(name):
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


MODULES = {module_name(file): file for file in sorted((ROOT / "clora").rglob("*.py"))}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in UNORDERED])
def test_imports_go_downwards(module):
    used = {name for name in imports_of(MODULES[module]) if name.startswith("clora.")}
    above = {name for name in used if layer_of(name) > layer_of(module)}
    assert not above, f"{module} (layer {layer_of(module)}) imports {above}"


@pytest.mark.parametrize("module", PURE)
def test_the_maths_takes_tensors_only(module):
    used = {name for name in imports_of(MODULES[module]) if name.startswith("clora.")}
    assert used <= PURE_MAY_USE


def test_only_ops_imports_the_kernels():
    """The backend asks whether Triton interprets, and nothing else."""
    used = {name: {i for i in imports_of(file) if i.startswith("csrc_triton")} for name, file in MODULES.items()}
    assert used.pop("clora.backend") == {"csrc_triton.registration"}
    assert {name for name, imports in used.items() if imports} == {"clora.ops"}


def test_kernels_do_not_import_clora():
    for file in (ROOT / "csrc_triton").rglob("*.py"):
        assert not any(name.startswith("clora") for name in imports_of(file)), file


def test_heavy_libraries_are_imported_inside_functions():
    """So that a command which does not need them starts at once."""
    for module, file in MODULES.items():
        top = ast.parse(file.read_text("utf-8")).body
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
        heavy = {
            name for name in names if name.partition(".")[0] in ("diffusers", "transformers", "peft", "matplotlib")
        }
        assert not heavy, f"{module} imports {heavy} at its top"
