# SPDX-License-Identifier: Apache-2.0
"""`vllm-merge tune` from end to end on the demo: one small run for real, the others at length in `full`."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.tuning.conftest import DATA, Run, WriteRecipe
from vllm_merge import Adapter, load_recipes
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan
from vllm_merge.tuning.branches import Sum, factor_branch
from vllm_merge.tuning.model import TuningModel

pytest.importorskip("matplotlib")
NAMES = ("reverse", "upper", "double")
CPU = torch.device("cpu")


def merged(file: Path, name: str):
    """What a server or `vllm-merge merge` makes of a recipe."""
    recipes = load_recipes(file)
    hashes = {adapter: hash_adapter(entry.path) for adapter, entry in recipes.adapters.items()}
    settings: dict[str, Any] = {"base_model_hash": "", "max_rank": 64, "dtype": "float32"}
    plan = make_plan(recipes, name, registry=default_registry(), adapter_hashes=hashes, **settings)
    return run_plan(plan, report="brief").factors


def logits(model: TuningModel, branches) -> torch.Tensor:
    tokens = [model.tokens(prompt, None)[0] for prompt in ("reverse: thumb ->", "upper: city ->")]
    with torch.no_grad(), model.attached(branches):
        return torch.cat([model.logits(torch.tensor([ids]), torch.ones(1, len(ids)))[0] for ids in tokens])


def test_weights_that_were_learned_are_what_is_served(
    run: Run, recipe: WriteRecipe, prompts_file, model: TuningModel, tmp_path: Path
) -> None:
    """NSC for real, layer by layer; then the recipe file against live branches with the same weights."""
    out = tmp_path / "out"
    file = recipe("task_arithmetic", NAMES, parameters={"lambda": 0.5}, rank="auto", load="lazy")
    data = prompts_file(NAMES, 2, ("task", "prompt"))
    arguments = ("tune", file, "--method", "nsc", "--data", data, "-o", out, "--per", "layer", "--json")
    code, printed, err = run(*arguments, "--steps", 6, "--rate", 0.05, "--batch", 2, "--max-rank", 64)
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    assert facts["run"]["best"] < facts["run"]["start"]
    assert facts["run"]["steps"] == 6
    assert {path.name for path in out.iterdir()} == {
        "recipe.yaml", "tuning.json", "report.md", "progress.png", "weights.png", "state.safetensors",
    }  # fmt: skip
    learned = load_recipes(out / "recipe.yaml").recipes["r-nsc"]
    assert (learned.merge_method, learned.load, learned.parameters) == ("task_arithmetic", "lazy", {})
    assert [item.parameters["weight"][0]["filter"] for item in learned.adapters] == ["model.layers.0."] * 3
    assert "filter" in str(learned.adapters[0].parameters["weight"])

    adapters = [Adapter.from_peft(ROOT / "examples" / "demo" / "adapters" / name) for name in NAMES]
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    by_layer = [{i["filter"]: i["value"] for i in item.parameters["weight"]} for item in learned.adapters]
    table = torch.tensor([[mine.get(m[: len("model.layers.0.")], 0.0) for mine in by_layer] for m in modules])
    served = {name: factor_branch(pair, CPU) for name, pair in merged(out / "recipe.yaml", "r-nsc").items()}
    live = logits(model, Sum(adapters, modules, CPU).branches(table))
    assert torch.allclose(logits(model, served), live, atol=2e-4)
    start = {name: factor_branch(pair, CPU) for name, pair in merged(file, "r").items()}
    assert not torch.allclose(logits(model, start), live, atol=2e-2)

    # The same again is the same; more steps go on from it.
    before = (out / "recipe.yaml").read_bytes()
    code, printed, _ = run(*arguments, "--steps", 6, "--rate", 0.05, "--batch", 2, "--max-rank", 64, "--resume")
    assert code == 0
    assert (out / "recipe.yaml").read_bytes() == before
    code, printed, _ = run(*arguments, "--steps", 8, "--rate", 0.05, "--batch", 2, "--max-rank", 64, "--resume")
    assert json.loads(printed)["run"]["steps"] == 8
    code, _, err = run(*arguments, "--steps", 8, "--rate", 0.01, "--batch", 2, "--max-rank", 64, "--resume")
    assert code == 2
    assert "rate: it was 0.05, now 0.01" in err


def test_adapters_that_were_corrected_are_what_is_served(
    run: Run, recipe: WriteRecipe, prompts_file, model: TuningModel, tmp_path: Path
) -> None:
    """SSR without labels, with a safety set, whose floor it does not reach."""
    out, safety = tmp_path / "out", tmp_path / "safety.jsonl"
    file = recipe("task_arithmetic", NAMES, parameters={"lambda": 0.5})
    safe = [("reverse", "reverse: cricket ->", "tekcirc"), ("upper", "upper: city ->", "CITYx")]
    rows = [json.dumps({"task": task, "prompt": prompt, "answer": answer}) + "\n" for task, prompt, answer in safe]
    safety.write_text("".join(rows), encoding="utf-8")
    data = prompts_file(NAMES, 3, ("task", "prompt"))
    code, printed, err = run(
        "tune", file, "--method", "ssr", "--data", data, "-o", out, "--safety", safety, "--floor", 0.75, "--max-rank", 64
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "safe answers, %" in printed
    assert "the safety score of 0.5 is under the floor of 0.75: neither `serve` nor `experiment promote`" in printed
    learned = load_recipes(out / "recipe.yaml")
    tuned = learned.recipes["r-ssr"]
    assert tuned.safety is not None
    assert (tuned.safety.score, tuned.safety.floor) == (0.5, 0.75)
    assert sorted(learned.adapters) == ["double-ssr", "reverse-ssr", "upper-ssr"]
    corrected = [Adapter.from_peft(out / "adapters" / name) for name in NAMES]
    modules = sorted({module for adapter in corrected for module in adapter.factors})
    scale = tuned.parameters["lambda"]
    served = {name: factor_branch(pair, CPU) for name, pair in merged(out / "recipe.yaml", "r-ssr").items()}
    live = logits(model, Sum(corrected, modules, CPU).branches(torch.full((len(modules), 3), scale)))
    assert torch.allclose(logits(model, served), live, atol=2e-4)


@pytest.mark.parametrize(
    ("method", "options", "line", "said"),
    [
        ("ssr", (), '{"prompt": "a", "task": "x"}', "none of its tasks is an adapter of the recipe"),
        ("nsc", (), '{"prompt": "a", "task": "upper"}', "has no prompts of reverse, double"),
        ("ssr", (), "", "has no prompts; a line is"),
        ("lorahub", (), '{"prompt": "a"}', "'answer' is missing, and --method lorahub needs one"),
        ("lorahub", (), '{"prompt": "a", "answer": "' + "b" * 300 + '"}', "the model's context holds 256"),
        ("tsv", (), '{"prompt": "a"}', "--method tsv: is unknown; methods: adamerging, adamerging++"),
        ("adamerging", ("--objective", "accuracy"), '{"prompt": "a"}', "it has no gradients"),
        ("ssr", ("--per", "layer"), '{"prompt": "a"}', "ssr has a closed form"),
        ("ssr", ("--floor", "0.5"), '{"prompt": "a"}', "is of the safety score; give --safety FILE"),
        ("adamerging++", (), '{"prompt": "a"}', "adamerging++ learns the weights of `ties` in space knots or core"),
    ],
)  # fmt: skip
def test_wrong_input(
    method: str, options: tuple[str, ...], line: str, said: str, run: Run, recipe: WriteRecipe, tmp_path: Path
) -> None:
    """Said in words, with nothing written."""
    data = tmp_path / "data.jsonl"
    data.write_text(line + "\n", encoding="utf-8")
    file = recipe("task_arithmetic", NAMES)
    code, out, err = run("tune", file, "--method", method, "--data", data, "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_a_recipe_whose_method_is_no_sum(run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path) -> None:
    file = recipe("tsv_m", NAMES)
    code, _, err = run("tune", file, "--method", "nsc", "--data", prompts_file(NAMES, 1), "-o", tmp_path / "out")
    assert code == 2
    assert "nsc learns the weights of a sum: change merge_method to task_arithmetic or linear" in err


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_loss_that_is_no_number_leaves_the_best_recipe(
    when: str, run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_merge.tuning.gradient import GradientLearner

    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("# an earlier one\n", encoding="utf-8")
    whole, value = GradientLearner.step, GradientLearner.value
    if when == "later":
        monkeypatch.setattr(GradientLearner, "step", lambda own: whole(own) if own.done < 2 else float("nan"))
        monkeypatch.setattr(GradientLearner, "value", lambda own: value(own) - own.done)  # every step is better
    else:
        monkeypatch.setattr(GradientLearner, "step", lambda own: float("nan"))
    file, data = recipe("task_arithmetic", NAMES), prompts_file(NAMES, 1)
    code, printed, err = run("tune", file, "--method", "nsc", "--data", data, "-o", out, "--steps", 4)
    assert code == 1
    if when == "later":
        assert "the loss is not a number at step 3 of 4; the best so far, of step 2, is in" in err
        assert load_recipes(out / "recipe.yaml").recipes["r-nsc"]
    else:
        assert "the loss is not a number at step 1 of 4; nothing better than the start was learned" in err
        assert (out / "recipe.yaml").read_text(encoding="utf-8") == "# an earlier one\n"
        assert printed == ""


def start_process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "vllm_merge", *(str(argument) for argument in arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.full
def test_ctrl_c_keeps_the_best_so_far(recipe: WriteRecipe, prompts_file, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file, data = recipe("task_arithmetic", NAMES), prompts_file(NAMES, 2)
    running = start_process("tune", file, "--method", "nsc", "--data", data, "-o", out, "--steps", 100_000)
    try:
        deadline = time.monotonic() + 300
        while not (out / "state.safetensors").is_file():
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        printed, err = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 0, err
    assert "of 100000 steps; --resume goes on" in printed
    assert load_recipes(out / "recipe.yaml").recipes["r-nsc"]


CONFIGS = sorted((ROOT / "configs" / "tuning").glob("*.yaml"))


def command(config: Path) -> list[str]:
    (line,) = [line for line in config.read_text(encoding="utf-8").splitlines() if line.startswith("#   vllm-merge ")]
    return shlex.split(line.removeprefix("#   vllm-merge "))


@pytest.mark.full
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_shipped_recipe_is_tuned(config: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command at its head, on a few prompts and for a few steps; what it writes merges."""
    monkeypatch.chdir(ROOT)
    arguments = command(config)
    arguments[arguments.index("-o") + 1] = str(tmp_path)
    code, printed, err = run(*arguments, "--limit", 2, "--steps", 2, "--json")
    assert code == 0, err
    facts = json.loads(printed)
    assert facts["run"]["best"] <= facts["run"]["start"]
    assert facts["accuracy"]["learned"]["mean"]["total"] == 16
    assert merged(tmp_path / "recipe.yaml", facts["name"])


def test_a_recipes_own_floor_stays(recipe: WriteRecipe) -> None:
    from types import SimpleNamespace

    from vllm_merge.tuning.tune import _floor

    plan = SimpleNamespace(name="r")
    guarded = load_recipes(recipe("linear", NAMES, safety={"floor": 0.8, "score": 0.9}))
    assert _floor(SimpleNamespace(file=guarded, plan=plan, floor=None)) == 0.8
    assert _floor(SimpleNamespace(file=guarded, plan=plan, floor=0.5)) == 0.5
    assert _floor(SimpleNamespace(file=load_recipes(recipe("linear", NAMES)), plan=plan, floor=None)) is None


def test_the_demos_data_is_of_the_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing that is learned from it is scored on it."""
    monkeypatch.syspath_prepend(str(DATA.parent))
    import tasks

    for name in ("validation.jsonl", "safety.jsonl"):
        rows = [json.loads(line) for line in (DATA.parent / name).read_text(encoding="utf-8").splitlines()]
        assert len(rows) >= 32
        for row in rows:
            source = row["prompt"].removeprefix(f"{row['task']}: ").removesuffix(" ->")
            assert tasks.split_of(source) == "validation"
            assert tasks.TASKS[row["task"]].answer(source) == row["answer"]
    monkeypatch.delitem(sys.modules, "tasks")


def test_the_page_has_what_was_measured() -> None:
    from benchmarks import tuning

    results = json.loads(tuning.RESULTS.read_text(encoding="utf-8"))
    page = tuning.PAGE.read_text(encoding="utf-8")
    assert tuning.renewed(page, tuning.table(results)) == page
    assert tuning.renewed(page, tuning.beside_random(results), tuning.BEGIN_RANDOM) == page
    assert {row["config"] for row in results["rows"]} == {config.stem for config in CONFIGS}
    by_name = {row["config"]: row for row in results["rows"]}
    for name in ("ssr", "adamerging"):  # the goal: under 3 minutes on 2 cores
        assert by_name[name]["cpu"] < 180
    assert by_name["ssr"]["after"]["mean"] > by_name["ssr"]["before"]["mean"]
    assert all(
        shlex.split(row["command"]) == command(tuning.CONFIGS / f"{row['config']}.yaml") for row in results["rows"]
    )


def test_every_method_has_a_recipe_and_a_page() -> None:
    from vllm_merge.tuning.methods import METHODS

    used = {arguments[arguments.index("--method") + 1] for arguments in map(command, CONFIGS)}
    assert used == set(METHODS)
    pages = {path.stem for path in (ROOT / "docs" / "tuning").glob("*.md")}
    assert {method.replace("++", "") for method in METHODS} | {"index", "mergealign"} <= pages
