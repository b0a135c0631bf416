# SPDX-License-Identifier: Apache-2.0
"""Every method has a page whose generated part is current, and a recipe that runs on the demo's adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_merge import list_methods
from vllm_merge.cli.app import app
from vllm_merge.recipe.schema import Recipe
from vllm_merge.recipe_files import load_recipes

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "methods"
FOLDER = ROOT / "configs" / "methods"
FILES = sorted(FOLDER.glob("*.yaml"))
METHODS = [spec.name for spec in list_methods()]
HEADINGS = ("## When\n", "## When not\n", "## Cost\n")


def recipes(file: Path) -> Mapping[str, Recipe]:
    return load_recipes(file).recipes


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("method_pages", ROOT / "tools" / "method_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current(tool: ModuleType) -> None:
    assert [path.name for path in tool.stale(PAGES)] == [], "run python tools/method_pages.py"


def test_a_changed_page_is_found(tool: ModuleType, tmp_path: Path) -> None:
    for path in PAGES.glob("*.md"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    page = tmp_path / "ties.md"
    page.write_text(page.read_text(encoding="utf-8").replace("| `density` |", "| `dense` |"), encoding="utf-8")
    (tmp_path / "linear.md").unlink()
    assert [path.name for path in tool.stale(tmp_path)] == ["linear.md", "ties.md"]
    page.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match=r"ties.md: put .* into it, once each"):
        tool.stale(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_page_tells_when_and_when_not(method: str) -> None:
    page = (PAGES / f"{method}.md").read_text(encoding="utf-8")
    positions = [page.find(heading) for heading in HEADINGS]
    assert -1 < positions[0] < positions[1] < positions[2], f"docs/methods/{method}.md lacks one of {HEADINGS}"


@pytest.mark.parametrize(
    ("file", "name"), [pytest.param(file, name, id=f"{file.stem}-{name}") for file in FILES for name in recipes(file)]
)
def test_a_recipe_runs(file: Path, name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["merge", str(file), name, "-o", str(tmp_path / "out"), "--max-rank", "64"])
    assert result.exit_code == 0, result.output
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_recipe(method: str) -> None:
    assert method in {recipe.merge_method for recipe in recipes(FOLDER / f"{method}.yaml").values()}
