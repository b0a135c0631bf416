# SPDX-License-Identifier: Apache-2.0
"""What RMM makes candidates of, and the subsets of prompts that it scores them on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tuning.conftest import Run, WriteRecipe
from tests.tuning.test_blocks import start_of
from tests.tuning.test_tune import logits, merged
from vllm_merge import UserInputError, load_recipes
from vllm_merge.tuning.batches import Encoded
from vllm_merge.tuning.blocks import Merger, Source
from vllm_merge.tuning.branches import factor_branch
from vllm_merge.tuning.data import read_prompts
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.methods import METHODS
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.objective import Goal, Loss, Term
from vllm_merge.tuning.pool import Pool
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.weights import Groups
from vllm_merge.tuning.written import Writer

NAMES = ("reverse", "upper", "add")
CPU = torch.device("cpu")


def pool_of(start: Start, *rules: str) -> Pool:
    return Pool(start, Groups.of(start.modules, "layer"), rules)


def size(start: Start, source: Source) -> float:
    """‖ΔW‖ over all modules, without λ."""
    return sum(float(pair.delta().double().norm()) ** 2 for pair in Merger(start).merged(source).values()) ** 0.5


def test_the_recipes_own_merge_rules_of_its_size_and_the_adapters(recipe: WriteRecipe) -> None:
    parameters = {"lambda": [{"filter": "mlp", "value": 0.5}, {"value": 0.8}], "weight": 0.7, "density": 0.6}
    start = start_of(recipe("magnitude_prune", NAMES, parameters=parameters, space="core"))
    pool = pool_of(start, "ties", "wudi")
    own, ties, wudi, *alone = pool.sources
    assert (own.name, own.merge_method, own.space) == ("magnitude_prune", "magnitude_prune", "core")
    assert own.inputs == {name: {"weight": 0.7, "density": 0.6} for name in NAMES}
    assert (ties.inputs, ties.parameters) == ({name: {"weight": 0.7} for name in NAMES}, {"density": 0.3})
    assert (wudi.inputs, wudi.parameters) == ({name: {"weight": 0.7} for name in NAMES}, {})
    assert alone == [Source.alone(name) for name in NAMES]

    layers = pool.groups
    assert layers == 5
    first = pool.blocks((0,) * layers)
    assert {first.scale[m] for m in start.modules if "mlp" in m} == {0.5}
    assert {first.scale[m] for m in start.modules if "mlp" not in m} == {0.8}
    scaled = Merger(start).factors(first)
    target = sum(float(pair.delta().double().norm()) ** 2 for pair in scaled.values()) ** 0.5
    for index, source in ((1, ties), (2, wudi)):
        (scale,) = set(pool.blocks((index,) * layers).scale.values())
        assert scale * size(start, source) == pytest.approx(target, rel=1e-3)
        assert scale != pytest.approx(1, abs=0.05)
    assert set(pool.blocks((3,) * layers).scale.values()) == {1.0}
    assert pool.words((0, 1, 1, 3, 0)) == "magnitude_prune: 0, 4; ties: 1, 2; reverse: 3 (of model.layers)"


def test_a_rule_may_have_the_name_of_an_adapter(recipe: WriteRecipe) -> None:
    start = start_of(recipe("ties", NAMES))
    assert [source.name for source in pool_of(start, "ties", "linear").sources] == ["ties", "ties-", "linear", *NAMES]


@pytest.mark.parametrize("rank", ["auto", 6])
def test_what_is_written_is_what_was_scored(
    rank: int | str, recipe: WriteRecipe, model: TuningModel, tmp_path: Path
) -> None:
    """A block of every kind of source, whole and cut."""
    file = recipe("task_arithmetic", NAMES, parameters={"lambda": 0.9}, seed=3, rank=rank)
    start = start_of(file)
    pool = pool_of(start, "ties", "dare_ties")
    choice = (0, 1, 2, 4, 1)
    assert [pool.sources[index].name for index in choice] == ["task_arithmetic", "ties", "dare_ties", "upper", "ties"]
    live = logits(model, pool.branches(choice))
    path = Writer(load_recipes(file), start, METHODS["rmm"], tmp_path / "out", []).write(
        Learned(blocks=pool.blocks(choice)), None
    )
    served = {module: factor_branch(pair, CPU) for module, pair in merged(path, "r-rmm").items()}
    assert torch.allclose(logits(model, served), live, atol=2e-4)
    for other in ((0,) * 5, (0, 1, 2, 3, 1), (0, 1, 1, 4, 1)):
        assert not torch.allclose(logits(model, pool.branches(other)), live, atol=1e-2)
    written = load_recipes(path)
    assert list(written.recipes) == ["r-rmm-task_arithmetic", "r-rmm-ties", "r-rmm-dare_ties", "r-rmm-upper", "r-rmm"]
    assert written.recipes["r-rmm-task_arithmetic"].seed == 3

    own = {module: factor_branch(pair, CPU) for module, pair in merged(file, "r").items()}
    assert torch.allclose(logits(model, pool.branches((0,) * 5)), logits(model, own), atol=2e-4)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (("tise",), "unknown merge method 'tise'"),
        (("slerp",), "--rules slerp: "),
    ],
)
def test_rules_that_cannot_merge_these(rules: tuple[str, ...], said: str, recipe: WriteRecipe) -> None:
    start = start_of(recipe("task_arithmetic", NAMES))
    with pytest.raises(UserInputError, match=said):
        pool_of(start, *rules)


def test_a_recipe_that_could_be_too_large(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_of(recipe("task_arithmetic", NAMES))
    pool_of(start, "ties")
    monkeypatch.setattr("vllm_merge.tuning.pool.MAX_BYTES", 1000)
    with pytest.raises(
        UserInputError, match=r"could have [0-9,]+ bytes, and a recipe file has at most 1,000; choose a coarser"
    ):
        pool_of(start, "ties")


def test_subsets_have_every_prompt_and_every_task(prompts_file, model: TuningModel) -> None:
    path = prompts_file(("reverse", "upper"), 6)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:-3]) + "\n", encoding="utf-8")  # six prompts of one task, three of the other
    data = Encoded(read_prompts(path), model, answers=True)
    assert [data.subsets(of_each) for of_each in (1, 4, 6, 7)] == [6, 2, 1, 1]

    def rows(number: int, of_each: int, seed: int) -> list[tuple[str | None, tuple[int, ...]]]:
        return [
            (task, tuple(token for token in ids.tolist() if token != model.pad))
            for batch in data.subset(number, of_each, seed)
            for task, ids in zip(batch.tasks, batch.ids, strict=True)
        ]

    subsets = [rows(number, 2, 0) for number in range(3)]
    assert [sorted(task for task, _ in subset) for subset in subsets] == [["reverse"] * 2 + ["upper"] * 2] * 3
    longer = [ids for subset in subsets for task, ids in subset if task == "reverse"]
    assert len(set(longer)) == 6
    assert len({ids for subset in subsets for task, ids in subset if task == "upper"}) == 3
    assert rows(0, 2, 0) == subsets[0] != rows(0, 2, 1)
    assert len(rows(0, 7, 0)) == 9  # nothing twice in one subset


def test_the_mean_over_the_subsets_is_the_value_of_all(prompts_file, model: TuningModel) -> None:
    data = Encoded(read_prompts(prompts_file(("reverse", "upper"), 4)), model, answers=True)
    goal = Goal([Term(1.0, data, Loss())])
    assert goal.subsets(2) == 2
    parts = [goal.value_on(model, number, 2, 0) for number in range(2)]
    assert parts[0] != parts[1]
    assert sum(parts) / 2 == pytest.approx(goal.value(model), rel=1e-5)


def test_from_the_command_to_the_recipe(run: Run, recipe: WriteRecipe, prompts_file, tmp_path: Path) -> None:
    """In two parts, as in one; then what is refused."""
    file = recipe("linear", NAMES, parameters={"lambda": 0.1})  # much too weak: an adapter alone is better
    data = prompts_file(NAMES, 3)
    common = ("--method", "rmm", "--objective", "loss", "--batch", 1, "--data", data, "--max-rank", 64, "--seed", 1)

    def tune(name: str, *more: object) -> dict:
        code, printed, err = run("tune", file, "-o", tmp_path / name, *common, "--json", *more)
        assert (code, err) == (0, "")
        return json.loads(printed)

    facts = tune("whole", "--steps", 3, "--rules", "ties")
    assert facts["run"]["best"] < facts["run"]["start"]
    assert facts["settings"]["rules"] == ["ties"]
    assert facts["settings"]["agent"] == "ppo"
    assert "candidates were looked at on a subset of the prompts" in facts["notes"][-2]
    assert "(of model.layers)" in facts["notes"][-1]
    assert (tmp_path / "whole" / "weights.png").is_file()
    assert merged(tmp_path / "whole" / "recipe.yaml", "r-rmm")
    by_chance = tune("random", "--steps", 3, "--rules", "ties", "--agent", "random")
    assert by_chance["settings"]["agent"] == "random"
    code, _, err = run(
        "tune", file, "-o", tmp_path / "whole", *common, "--steps", 4, "--rules", "ties,wudi", "--resume"
    )
    assert code == 2
    assert "rules: it was ['ties'], now ['ties', 'wudi']" in err
    for option, value in (("--rules", "ties"), ("--agent", "random")):
        code, _, err = run("tune", file, "--method", "enmp", "--data", data, "-o", tmp_path / "not", option, value)
        assert code == 2
        assert f"{option}: is a choice of rmm" in err
    code, _, err = run("tune", file, "-o", tmp_path / "not", *common, "--rules", "slerp")
    assert code == 2
    assert "--rules slerp:" in err
    assert not (tmp_path / "not").exists()
