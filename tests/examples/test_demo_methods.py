# SPDX-License-Identifier: Apache-2.0
"""`make demo-methods`: how λ is chosen, which recipes are taken, and that the page says what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.conftest import DEMO
from vllm_merge import Adapter, list_methods, merge

pytest.importorskip("transformers")
pytest.importorskip("openai")
NAMES = ("choose", "measure", "methods", "run", "server", "tasks")


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The demo's scripts, which are neighbours of each other and no package."""
    import importlib

    before = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    sys.path.insert(0, str(DEMO))
    found: dict[str, ModuleType] = {name: importlib.import_module(name) for name in NAMES}
    yield SimpleNamespace(**found)
    sys.path.remove(str(DEMO))
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.fixture(scope="module")
def model(demo: SimpleNamespace) -> SimpleNamespace:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    base = {name: value.clone() for name, value in network.state_dict().items()}
    return SimpleNamespace(network=network, tokenizer=AutoTokenizer.from_pretrained(DEMO / "model"), base=base)


def test_one_forward_pass_says_what_generation_says(demo: SimpleNamespace, model: SimpleNamespace) -> None:
    """At a merge that gets some right and some wrong."""
    adapters = [Adapter.from_peft(DEMO / "adapters" / name) for name in ("upper", "double", "reverse")]
    merged = merge(adapters, merge_method="task_arithmetic", parameters={"lambda": 0.8})
    deltas = {f"{module}.weight": merged.delta(module) for module in merged.factors}
    model.network.load_state_dict({k: v + deltas[k] if k in deltas else v for k, v in model.base.items()})
    prompts = [
        e
        for name in ("upper", "double", "reverse")
        for e in demo.tasks.examples(demo.tasks.TASKS[name], "validation", 8, 3)
    ]
    answers = demo.measure.answers(model.network, model.tokenizer, [example.prompt for example in prompts])
    generated = [text == example.answer for text, example in zip(answers, prompts, strict=True)]
    assert demo.choose.right(model.network, model.tokenizer, prompts) == generated
    assert 0 < sum(generated) < len(generated)
    model.network.load_state_dict(model.base)


def test_lambda_does_not_depend_on_a_methods_scale(demo: SimpleNamespace, model: SimpleNamespace) -> None:
    """A mean of two and their sum are one result, and get the same grid, up to the factor 2."""
    adapters = [Adapter.from_peft(DEMO / "adapters" / name) for name in ("upper", "sort")]
    prompts = [e for name in ("upper", "sort") for e in demo.tasks.examples(demo.tasks.TASKS[name], "validation", 4, 3)]
    found = {}
    for method in ("linear", "task_arithmetic"):
        merged = merge(adapters, merge_method=method)
        around = demo.choose.sum_norm(adapters) / demo.choose.norm(merged)
        found[method] = demo.choose.choose(model.network, model.tokenizer, model.base, merged, around, prompts)
    assert found["linear"].lam == pytest.approx(2 * found["task_arithmetic"].lam)
    assert list(found["linear"].tried.values()) == list(found["task_arithmetic"].tried.values())
    assert max(found["linear"].tried.values()) == 1.0
    assert all(torch.equal(value, model.base[name]) for name, value in model.network.state_dict().items())


def test_every_method_with_a_recipe_is_taken(demo: SimpleNamespace) -> None:
    names = [spec.name for spec in list_methods() if (demo.methods.CONFIGS / f"{spec.name}.yaml").is_file()]
    rows = list(demo.methods.rows(names))
    assert {row["method"] for row in rows} == set(names)
    assert {"ties", "task_arithmetic", "opcm"} <= set(names)
    assert all(set(row["tasks"]) <= set(demo.tasks.TASKS) and row["tasks"] for row in rows)
    assert all("lambda" not in row["parameters"] for row in rows)


def test_the_recipes_that_are_served_are_valid(demo: SimpleNamespace, tmp_path: Path) -> None:
    from vllm_merge import load_recipes

    rows = list(demo.methods.rows(["ties", "opcm"]))
    for row in rows:
        row["lambda"] = 1.5
    demo.methods.write_recipes(tmp_path / "r.yaml", rows)
    file = load_recipes(tmp_path / "r.yaml")
    assert {recipe.parameters["lambda"] for recipe in file.recipes.values()} == {1.5}
    assert {recipe.load for recipe in file.recipes.values()} == {"lazy"}


def test_the_pages_have_what_was_measured(demo: SimpleNamespace) -> None:
    results = json.loads(demo.methods.RESULTS.read_text(encoding="utf-8"))
    for path, block in ((demo.methods.PAGE, demo.methods.table), (demo.methods.CHOOSING, demo.methods.choices)):
        page = path.read_text(encoding="utf-8")
        assert demo.methods.renewed(page, block(results["rows"])) == page
    whole = [row for row in results["rows"] if len(row["tasks"]) == len(demo.tasks.TASKS)]
    assert max(row["kept"] for row in whole) >= demo.methods.KEPT
    for row in whole:
        assert demo.methods.table([row]).count(f"| {100 * row['kept']:.1f} |") == 1
        mean = sum(row["accuracy"].values()) / sum(row["adapters"].values())
        assert row["kept"] == pytest.approx(mean, abs=1e-3)
        assert row["lambda"] in {float(lam) for lam in row["validation"]}
