"""The documentation holds: examples run, links lead somewhere, and README lists every room, as `tests/` does."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for folder in (".", "docs", "csrc_triton", "bench") for page in sorted((ROOT / folder).glob("*.md"))]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "extending.md").read_text("utf-8"), re.M | re.S)
ALONE = [block for block in BLOCKS if block.startswith(("import ", "from "))]
FILES = {block.split("\n")[0].removeprefix("# "): block for block in BLOCKS if block.startswith("# ")}


def page_id(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("block", ALONE, ids=["model family", "effect"])
def test_examples_of_extensions_run(block, monkeypatch):
    from clora.models import registry

    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    exec(compile(block, "docs/extending.md", "exec"), {"__name__": "example"})


def test_the_example_of_an_op_equals_its_reference(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    import csrc_triton
    from clora import ops
    from csrc_triton.registration import INTERPRETED

    monkeypatch.setattr(csrc_triton, "__path__", [*csrc_triton.__path__, str(tmp_path)])
    (tmp_path / "scale_rows").mkdir()
    (tmp_path / "scale_rows" / "__init__.py").touch()
    for name, block in FILES.items():
        if name != "clora/ops.py":
            (tmp_path / "scale_rows" / Path(name).name).write_text(block, "utf-8")
    namespace = dict(vars(ops))
    exec(compile(FILES["clora/ops.py"], "docs/extending.md", "exec", dont_inherit=True), namespace)
    device = "cpu" if INTERPRETED else "cuda"
    x = torch.randn(3, 1025, device=device, requires_grad=True)
    scale = torch.randn(3, device=device, requires_grad=True)
    results = []
    for backend in ("triton", "eager"):
        y = namespace["scale_rows"](x, scale, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, scale))])
    torch.testing.assert_close(*results)


def test_the_example_of_readme_runs_as_printed(tmp_path, monkeypatch):
    """On what a demo writes, with a teacher's file in place of a trained student."""
    from clora.collection.write import make_collection, write_collection
    from clora.commands.demo import save_held_out
    from clora.lora.layers import linear_shapes
    from clora.lora.load import read_lora
    from clora.studio import assets
    from clora.studio.demo_config import demo_config
    from clora.studio.teacher_files import teacher_path

    adapter, names = assets.load_studio(assets.ASSETS, "cpu"), ["snow", "thermal"]
    loras = {name: teacher_path(assets.ASSETS, name) for name in names}
    student = read_lora(loras["snow"], linear_shapes(adapter.pipeline.transformer))
    described = make_collection(demo_config(names, 0), adapter, "studio", loras, dict.fromkeys(names))
    write_collection(student, described, tmp_path / "clora-demo" / "collection", torch.float16)
    save_held_out(tmp_path / "clora-demo", (64, 64))
    (section,) = re.findall(r"^## Use the result\n(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    # The command of this interpreter's environment, whether it is activated or not.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    namespace = {"__name__": "example"}
    for block in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["prompt"] in described.effects[0].prompts
    assert namespace["both"].size == (64, 64)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_python_in_pages_compiles(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        compile(block, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        headings = re.findall(r"^#+ (.+)$", linked.read_text("utf-8"), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_pages_name_exist(page):
    """Paths in backticks such as `clora/lora/keys.py`; those with a placeholder are not of this kind."""
    for name in re.findall(r"`((?:clora|csrc_triton|tests|bench|docs)/[\w./]+\.\w+)`", page.read_text("utf-8")):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_names_stand_in_the_file_that_pages_name(page):
    """Such as "`SHARED_INPUTS` of `clora/bank/routing.py`"."""
    for name, file in re.findall(
        r"`(\w+)`\s+of\s+`((?:clora|csrc_triton|tests|bench)/[\w./]+\.py)`", page.read_text("utf-8")
    ):
        assert re.search(rf"^(?:def |class )?{name}\b", (ROOT / file).read_text("utf-8"), re.M), (name, file)


def test_names_in_the_walks_exist():
    """Names in backticks such as `UNDERSCORED` occur in the sources; code blocks have names of their own."""
    page = re.sub(r"^```.*?^```", "", (ROOT / "docs" / "extending.md").read_text("utf-8"), flags=re.M | re.S)
    files = [file for folder in ("clora", "csrc_triton", "tests") for file in (ROOT / folder).rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(file.read_text("utf-8") for file in files if file != Path(__file__))))
    assert set(re.findall(r"`(\w+)(?:\(\.\.\.\))?`", page)) <= words


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert all(f"]({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_readme_lists_every_room_and_tests_has_its_folder():
    (section,) = re.findall(r"^## Where things are\n(.*?)^## ", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    rooms = {folder.name for folder in (ROOT / "clora").iterdir() if (folder / "__init__.py").exists()}
    assert rooms <= set(re.findall(r"`(\w+)/`", section))
    tested = {folder.name for folder in (ROOT / "tests").iterdir() if any(folder.rglob("*.py"))}
    assert rooms <= tested
    (section,) = re.findall(r"^## Test\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S)
    assert tested - rooms == set(re.findall(r"`(\w+)/`", section)) - {"tests", "clora"}
