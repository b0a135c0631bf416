# SPDX-License-Identifier: Apache-2.0
"""Blocks of several merges: what is scored is what the written recipe merges to, and the recipe stays small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tuning.conftest import WriteRecipe
from tests.tuning.test_tune import logits, merged
from vllm_merge import load_recipes
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.plan import make_plan
from vllm_merge.tuning.blocks import Blocks, Merger, Source, recipes
from vllm_merge.tuning.branches import factor_branch
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.methods import METHODS
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.weights import filtered
from vllm_merge.tuning.written import Writer

NAMES = ("reverse", "upper", "add")
CPU = torch.device("cpu")
ALL: dict[str, dict[str, float]] = {name: {} for name in NAMES}


def start_of(file: Path) -> Start:
    found = load_recipes(file)
    hashes = {name: hash_adapter(entry.path) for name, entry in found.adapters.items()}
    plan = make_plan(
        found, "r", registry=default_registry(), adapter_hashes=hashes, base_model_hash="", max_rank=64, dtype="float32"
    )
    return Start.of(plan, CPU)


def write(file: Path, blocks: Blocks, start: Start, folder: Path) -> Path:
    return Writer(load_recipes(file), start, METHODS["enmp"], folder, []).write(Learned(blocks=blocks), None)


def mixed(start: Start) -> Blocks:
    """Whole sources and partial ones, a single adapter, factors, and modules that do not change."""
    early = tuple(m for m in start.modules if "layers.0." in m or "layers.1." in m)
    weight = {m: 0.4 if "layers.0." in m else 1.2 for m in early}
    sources = (
        Source("ties", "ties", ALL, space="core", parameters={"density": 0.3}),  # trimmed over the whole model
        Source("sum", "linear", {n: {"weight": weight} for n in NAMES}, parameters={"normalize": False}, modules=early),
        Source.alone("upper"),
    )
    choice = dict.fromkeys(early, "sum") | {m: "ties" for m in start.modules if "layers.2." in m}
    choice |= {m: "upper" for m in start.modules if "layers.4." in m}
    return Blocks(sources, choice, {m: 0.5 if "mlp" in m else 1.5 for m in start.modules})


@pytest.mark.parametrize("precondition", [[], ["norm_cap"]])
def test_what_is_written_is_what_was_scored(
    precondition: list[str], recipe: WriteRecipe, model: TuningModel, tmp_path: Path
) -> None:
    file = recipe("task_arithmetic", NAMES, precondition=precondition, parameters={"lambda": 0.9}, seed=4)
    start = start_of(file)
    blocks = mixed(start)
    path = write(file, blocks, start, tmp_path / "out")
    served = merged(path, "r-enmp")
    scored = Merger(start).factors(blocks)
    assert set(served) == set(scored) == {m for m in start.modules if "layers.3." not in m} & set(scored)
    assert any("layers.4." in m for m in scored)
    for module, pair in scored.items():
        expected = pair.delta()
        assert torch.allclose(served[module].delta(), expected, atol=1e-5 * float(expected.abs().max())), module
        assert served[module].rank == pair.rank  # nothing was stacked that adds nothing
    live = logits(model, Merger(start).branches(blocks))
    assert torch.allclose(logits(model, {m: factor_branch(p, CPU) for m, p in served.items()}), live, atol=2e-4)
    assert not torch.allclose(logits(model, {}), live, atol=2e-2)
    file_written = load_recipes(path)
    assert list(file_written.recipes) == ["r-enmp-ties", "r-enmp-sum", "r-enmp-upper", "r-enmp"]
    assert file_written.recipes["r-enmp"].parameters == {}
    assert [file_written.recipes[n].load for n in file_written.recipes] == ["lazy", "lazy", "lazy", "eager"]
    assert [file_written.recipes[n].seed for n in file_written.recipes] == [4, 4, 4, 0]  # the sum has nothing random
    assert [bool(file_written.recipes[n].precondition) for n in file_written.recipes] == [bool(precondition)] * 3 + [
        False
    ]


def test_a_source_for_some_modules_is_that_of_all(recipe: WriteRecipe) -> None:
    start = start_of(recipe("linear", NAMES))
    some = tuple(m for m in start.modules if "mlp" in m or "layers.4." in m)
    whole = Merger(start).merged(Source("t", "ties", ALL, space="core", parameters={"trim": "module"}))
    part = Merger(start).merged(Source("t", "ties", ALL, space="core", parameters={"trim": "module"}, modules=some))
    assert set(part) == set(some)
    assert all(torch.allclose(part[m].delta(), whole[m].delta(), atol=1e-6) for m in some)


def test_whole_sources_are_merged_once(recipe: WriteRecipe) -> None:
    start = start_of(recipe("linear", NAMES))
    merger, source = Merger(start), Source.alone("upper")
    assert merger.merged(source) is merger.merged(Source.alone("upper"))
    assert set(merger.merged(source)) == set(start.adapters[1].factors)


def test_no_change_at_all_is_a_recipe_too(recipe: WriteRecipe, tmp_path: Path) -> None:
    file = recipe("linear", NAMES)
    start = start_of(file)
    path = write(file, Blocks((Source.alone("upper"),), {}), start, tmp_path / "out")
    assert merged(path, "r-enmp") == {}


def test_one_source_is_the_recipe_itself() -> None:
    modules = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    source = Source("t", "ties", {"a": {"weight": 0.5}, "b": {}}, "core")
    own = {
        "merge_method": "linear",
        "adapters": [],
        "rank": 8,
        "seed": 2,
        "precondition": ["norm_cap"],
        "load": "eager",
    }
    assert recipes(Blocks((source,), {modules[0]: "t"}), modules, "r", own) == (
        {},
        {
            "merge_method": "ties",
            "space": "core",
            "adapters": [{"adapter": "a", "parameters": {"weight": 0.5}}, {"adapter": "b"}],
            "parameters": {"lambda": [{"filter": "model.layers.0.", "value": 1.0}, {"value": 0.0}]},
            "rank": 8,
            "seed": 2,
            "precondition": ["norm_cap"],
            "load": "eager",
        },
    )


def test_names_have_room() -> None:
    modules, long = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"), "a" * 64
    blocks = Blocks((Source.alone(long), Source.alone("b")), dict(zip(modules, (long, "b"), strict=True)))
    stages, last = recipes(blocks, modules, "r" * 64, {})
    assert list(stages) == ["r" * 62 + "-0", "r" * 62 + "-b"]
    assert last["adapters"] == [{"adapter": name} for name in stages]


def test_few_filters_say_it() -> None:
    modules = [f"model.layers.{i}.{n}" for i in (0, 1, 11) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")]
    modules.append("lm_head")

    def by(at) -> dict[str, float]:
        return {module: at(module) for module in modules}

    assert filtered(by(lambda m: 1.0)) == 1.0
    assert filtered(by(lambda m: 0.5 if "attn" in m else 0.0), rest=0.0) == [
        {"filter": "self_attn", "value": 0.5},
        {"value": 0.0},
    ]
    assert filtered(by(lambda m: 0.5 if "1.self" in m else 0.0), rest=0.0) == [
        {"filter": "model.layers.1.self_attn", "value": 0.5},
        {"filter": "model.layers.11.self_attn", "value": 0.5},
        {"value": 0.0},
    ]
    one = {m: 0.25 if m == modules[0] else None for m in modules}  # what the others get does not matter
    assert filtered(one) == 0.25
    within = {"head": 1.0, "lm_head": 0.0, "x": 0.0}
    assert filtered(within, rest=0.0)[0] == {"filter": "lm_head", "value": 0.0}  # which has `head` in it
