# SPDX-License-Identifier: Apache-2.0
"""`vllm-merge tune --method lfs` from end to end: what is learned is what is served, with and without a break in between."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.tuning.conftest import Run, WriteRecipe
from tests.tuning.test_blocks import start_of
from tests.tuning.test_tune import merged
from vllm_merge import MergeError, load_recipes
from vllm_merge.tuning.batches import Encoded
from vllm_merge.tuning.branches import factor_branch
from vllm_merge.tuning.data import read_prompts
from vllm_merge.tuning.layerwise import PUBLISHED, Space
from vllm_merge.tuning.lfs import LayerwiseSearch, _beats
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.objective import Accuracy, Goal, Loss, Term
from vllm_merge.tuning.samples import Samples

pytest.importorskip("matplotlib")
pytest.importorskip("optuna")
NAMES = ("reverse", "upper", "double")
CPU = torch.device("cpu")


def arguments(file: Path, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "tune", file, "--method", "lfs", "--data", data, "-o", out, "--groups", 2, "--max-rank", 64, "--json", *more
    )  # fmt: skip


def test_what_was_learned_is_what_is_served(
    run: Run, recipe: WriteRecipe, prompts_file, model: TuningModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, gone on with, and run without a break; then the recipe file against the value that is on record."""
    file, data = recipe("task_arithmetic", NAMES, parameters={"lambda": 0.3}), prompts_file(NAMES, 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, printed, err = run(*arguments(file, data, whole, "--steps", 6))
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    assert facts["run"]["best"] < facts["run"]["start"]
    assert facts["settings"]["rules"] == list(PUBLISHED)
    assert (facts["settings"]["groups"], facts["settings"]["sampler"]) == (2, "tpe")
    assert "candidates, " in facts["notes"][0]
    assert "of them on all 9 prompts" in facts["notes"][0]
    assert facts["notes"][1].startswith("layers 0–2, attention: ")
    assert "layers 3–4, mlp" in (whole / "report.md").read_text(encoding="utf-8")

    calls = iter(range(1000))

    @contextmanager
    def stopping() -> Iterator[object]:
        yield lambda: next(calls) >= 3  # asked before each step

    with monkeypatch.context() as patch:
        patch.setattr("vllm_merge.cli.tune.interrupts", stopping)
        code, printed, err = run(*arguments(file, data, broken, "--steps", 6))
    assert (code, err) == (0, "")
    halfway = json.loads(printed)["run"]
    assert halfway["stopped"]
    assert halfway["steps"] == 3
    code, printed, _ = run(*arguments(file, data, broken, "--steps", 6, "--resume"))
    assert code == 0
    assert (broken / "recipe.yaml").read_bytes() == (whole / "recipe.yaml").read_bytes()
    again = json.loads(printed)
    kept = ("start", "best", "best_step", "steps", "history")
    assert {key: again["run"][key] for key in kept} == {key: facts["run"][key] for key in kept}
    assert again["notes"] == facts["notes"]
    code, _, err = run(*arguments(file, data, broken, "--steps", 6, "--resume", "--sampler", "random"))
    assert code == 2
    assert "sampler: it was 'tpe', now 'random'" in err

    goal = Goal([Term(1.0, Encoded(read_prompts(data), model, answers=True), Loss())])
    served = merged(whole / "recipe.yaml", "r-lfs")
    with model.attached({name: factor_branch(pair, CPU) for name, pair in served.items()}):
        assert goal.value(model) == pytest.approx(facts["run"]["best"], rel=1e-3)
    names = list(load_recipes(whole / "recipe.yaml").recipes)
    assert names[-1] == "r-lfs"
    assert set(names[:-1]) <= {f"r-lfs-{rule}" for rule in PUBLISHED}


def test_several_objectives(run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path) -> None:
    file, data, safety = recipe("linear", NAMES), prompts_file(NAMES, 2), tmp_path / "safety.jsonl"
    safety.write_text('{"prompt": "reverse: cricket ->", "answer": "tekcirc"}\n', encoding="utf-8")
    more = ("--objective", "loss", "--safety", safety, "--objective", "safety", "--steps", 6)
    code, printed, err = run(*arguments(file, data, tmp_path / "out", *more))
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    assert facts["run"]["objective"] == "loss, safety: mean share of the start"
    assert facts["run"]["start"] == 1.0
    assert facts["run"]["best"] < 1.0
    assert facts["notes"][0].startswith("6 candidates, 6 of them on all 7 prompts; 42 prompts")
    (head,) = [index for index, note in enumerate(facts["notes"]) if note.startswith("Pareto front")]
    front = facts["notes"][head + 1 :]
    assert facts["notes"][head] == f"Pareto front, by mean share of the start ({len(front)} of 7):"
    assert all(": loss " in line and ", safety " in line for line in front)
    assert front[0].startswith(f"candidate {facts['run']['best_step']}: ")  # the one that is written
    points = [[float(part.split()[-1]) for part in line.partition(": ")[2].split(", ")] for line in front]
    assert not any(_beats(one, other) for one in points for other in points)
    assert front[0] in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_what_is_better_in_everything() -> None:
    assert _beats([1.0, 2.0], [1.0, 3.0])
    assert not _beats([1.0, 2.0], [1.0, 2.0])
    assert not _beats([1.0, 4.0], [1.5, 3.0])


@pytest.mark.full
def test_every_task_is_an_objective(run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path) -> None:
    file, data = recipe("linear", NAMES), prompts_file(NAMES, 2)
    code, printed, err = run(*arguments(file, data, tmp_path / "out", "--objective", "tasks", "--steps", 6))
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    assert facts["notes"][0].startswith("6 candidates, 6 of them on all 6 prompts")
    assert all(f"{name} " in note for name in NAMES for note in facts["notes"] if note.startswith("candidate "))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rules", "ties,tsv"), "--rules: tsv is unknown; rules: task_arithmetic, ties"),
        (("--per", "layer"), "--per layer: lfs searches by --groups of layers"),
        (("--objective", "safety"), "--objective safety: is the loss on the safety set; give --safety FILE"),
        (("--objective", "tasks"), "--objective tasks: "),
        (("--agent", "ppo"), "--agent: is a choice of rmm, which lfs does not have"),
    ],
)
def test_wrong_input(
    options: tuple[str, ...], said: str, run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path
) -> None:
    data = prompts_file(NAMES, 1, ("prompt", "answer"))
    code, out, err = run(*arguments(recipe("linear", NAMES), data, tmp_path / "out", *options))
    assert (code, out) == (2, "")
    assert said in err
    assert not (tmp_path / "out").exists()


def test_its_options_are_not_of_others(run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path) -> None:
    file, data = recipe("linear", NAMES), prompts_file(NAMES, 1)
    for option, value in (("--groups", 2), ("--sampler", "random"), ("--objective", "tasks")):
        code, _, err = run("tune", file, "--method", "lorahub", "--data", data, "-o", tmp_path / "out", option, value)
        assert code == 2
        assert f"{option}: is a choice of lfs, which lorahub does not have" in err


def goal_of(data: Path, model: TuningModel) -> Goal:
    encoded = Encoded(read_prompts(data), model, answers=True)
    return Goal([Term(1.0, encoded, Loss()), Term(0.5, encoded, Accuracy())])


def test_the_largest_size_is_the_goal(prompts_file, model: TuningModel) -> None:
    """Of tasks of different lengths too; and each prompt is looked at once."""
    data = prompts_file(NAMES, 5)
    rows = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(row for index, row in enumerate(rows) if index not in (1, 2, 3)), encoding="utf-8")
    goal = goal_of(data, model)
    samples = Samples(goal, [1, 3, 5], seed=0)
    assert samples.rows == [6, 10, 8]
    first, second, last = samples.values(model)
    assert last == pytest.approx(goal.value(model), rel=1e-5)
    assert len({first, second, last}) == 3
    assert list(Samples(goal, [1, 3, 5], seed=0).values(model)) == [first, second, last]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_step_costs_what_all_prompts_cost(
    sampler: str, recipe: WriteRecipe, prompts_file, model: TuningModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever searches, and where merges fail; and nothing of a candidate stays with the model."""
    start = start_of(recipe("linear", NAMES))
    goal = goal_of(prompts_file(NAMES, 3), model)
    search = LayerwiseSearch(model, start, Space(start, 2, PUBLISHED), {"loss": goal}, sampler=sampler, seed=0)
    seen: list[int] = []
    rows = Loss.rows

    def counting(own: Loss, of: TuningModel, batch) -> torch.Tensor:
        seen.append(len(batch.tasks))
        return rows(own, of, batch)

    monkeypatch.setattr(Loss, "rows", counting)
    begin = search.value()
    assert sum(seen) == 9
    seen.clear()
    for step in range(1, 7):
        search.step()
        assert 9 * step <= sum(seen) < 9 * (step + 1)
    assert not any(module._forward_hooks for module in model._model.modules())
    assert search.value() <= begin

    def fails(*given: object) -> None:
        raise MergeError("the merged weight change is not finite")

    monkeypatch.setattr("vllm_merge.tuning.blocks.Merger.branches", fails)
    before, made = search.value(), search._study.made
    assert search.step() == search.value() == before
    assert search._study.made > made
