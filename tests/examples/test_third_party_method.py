# SPDX-License-Identifier: Apache-2.0
"""A merge method of another package: installed into an environment of its own, then merged offline and served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.conftest import DEMO, ROOT, servers
from vllm_merge import Adapter, MergedAdapter, MergeError, list_methods
from vllm_merge.methods.registry import default_registry

PACKAGE = ROOT / "examples" / "third_party_method"
RECIPE = f"""\
version: 1
base_model: {DEMO / "model"}
adapters: {{upper: {{path: {DEMO / "adapters" / "upper"}}}, sort: {{path: {DEMO / "adapters" / "sort"}}}}}
recipes:
  both:
    merge_method: largest_entry
    space: delta
    adapters: [{{adapter: upper}}, {{adapter: sort, parameters: {{weight: 1.25}}}}]
    rank: lossless
  served:
    merge_method: largest_entry
    adapters: [{{adapter: upper, parameters: {{weight: 1.3}}}}, {{adapter: sort}}]
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that sees this one's packages and has the method's package beside them."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    shared = sysconfig.get_path("purelib")
    (own / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    interpreter = folder / "bin" / "python"
    install = ["-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", str(PACKAGE)]
    done = subprocess.run([interpreter, *install], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (own / "largest_entry.py").is_file()
    return interpreter


def vllm_merge(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "vllm_merge", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_it_is_installed_there_and_not_here(python: Path) -> None:
    listed = json.loads(vllm_merge(python, "methods", "--json").stdout)
    assert "largest_entry" in json.dumps(listed)
    assert "largest_entry" not in {spec.name for spec in list_methods()}


def test_an_offline_merge(python: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = vllm_merge(python, "merge", tmp_path / "r.yaml", "both", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    merged = MergedAdapter.from_pretrained(tmp_path / "out")
    upper, sort = (Adapter.from_peft(DEMO / "adapters" / name) for name in ("upper", "sort"))
    for module, factors in sort.factors.items():
        mine = 1.25 * factors.delta()
        other = upper.factors[module].delta() if module in upper.factors else torch.zeros_like(mine)
        expected = torch.where(other.abs() >= mine.abs(), other, mine)
        assert float((merged.delta(module) - expected).norm() / expected.norm()) < 1e-5


def test_its_parameters_are_checked_like_any(python: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("rank: lossless", "parameters: {floor: -1}"))
    done = vllm_merge(python, "validate", tmp_path / "r.yaml")
    assert done.returncode == 2
    assert (
        "recipes.both.parameters.floor: merge method 'largest_entry': parameter 'floor' is -1; allowed is number ≥ 0"
    ) in done.stderr


def test_without_the_package_the_recipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    done = vllm_merge(Path(sys.executable), "validate", tmp_path / "r.yaml")
    assert done.returncode == 2
    assert "recipes.both.merge_method: unknown merge method 'largest_entry'" in done.stderr


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = metadata.EntryPoint("x", "no_such_module_of_a_method", "vllm_merge.methods")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    with pytest.raises(
        MergeError, match=r"\(no_such_module_of_a_method\) cannot be imported: No module named .*; mend"
    ):
        default_registry.__wrapped__()


@pytest.mark.full
@pytest.mark.server
def test_a_served_recipe(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from openai import OpenAI

    served, both = RECIPE.index("  served:"), RECIPE.index("  both:")
    (tmp_path / "r.yaml").write_text(RECIPE[:both] + RECIPE[served:])
    command = servers.merge_serve(DEMO / "model", tmp_path / "r.yaml", "--max-lora-rank", "64")
    with (
        servers.running([str(python), *command[1:]]) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        answers = [
            client.completions.create(model="served", prompt=prompt, max_tokens=8, temperature=0, stop=["\n"])
            for prompt in ("upper: stone ->", "sort: stone ->")
        ]
    assert answers[0].model.startswith("served@")
    assert [answer.choices[0].text.strip() for answer in answers] == ["STONE", "enost"]


def test_the_page_shows_the_package() -> None:
    page = (ROOT / "docs" / "methods" / "own.md").read_text(encoding="utf-8")
    module = (PACKAGE / "largest_entry.py").read_text(encoding="utf-8")
    code = module.split("\n", 1)[1]
    assert code.strip() in page
    assert '[project.entry-points."vllm_merge.methods"]\nlargest_entry = "largest_entry"' in page
