# SPDX-License-Identifier: Apache-2.0
"""The candidates of LFS: what they are of, that each rule writes what it scores, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuning.conftest import WriteRecipe
from tests.tuning.test_blocks import start_of, write
from tests.tuning.test_tune import merged
from vllm_merge import UserInputError
from vllm_merge.tuning.blocks import Merger
from vllm_merge.tuning.layerwise import NONE, PUBLISHED, RULES, Space, cells_of

NAMES = ("reverse", "upper", "add")  # attention alone, MLP alone, and two projections of attention


class Drawn:
    """Values by a seed; the rules as they are given, by turns."""

    def __init__(self, seed: int, rules: Sequence[str] | None = None) -> None:
        self._random, self._rules = random.Random(seed), list(rules or [])
        self.asked: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: Sequence[str]) -> str:
        self.asked[name] = tuple(choices)
        return self._rules[len(self.asked) % len(self._rules)] if self._rules else self._random.choice(choices)

    def suggest_float(self, name: str, low: float, high: float) -> float:
        return self._random.uniform(low, high)


def test_cells_are_neighbouring_layers_by_kind() -> None:
    modules = [
        *(f"model.layers.{i}.{n}" for i in range(10) for n in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.0.w1")),
        "model.embed_tokens",
        "lm_head",
    ]
    cells = cells_of(modules, 4)
    assert [cell.name for cell in cells] == [
        *(f"layers {span}, {kind}" for span in ("0–2", "3–4", "5–7", "8–9") for kind in ("attention", "mlp")),
        "model.embed_tokens, lm_head",
    ]
    assert sorted(module for cell in cells for module in cell.modules) == sorted(modules)
    assert len(cells_of(modules, 1)) == 3
    assert len(cells_of(modules, 1000)) == 21
    two = [f"{stack}.{i}.attn.qkv" for stack in ("text.layers", "vision.blocks") for i in range(4)]
    assert [cell.name for cell in cells_of(two, 4)] == [
        f"layers {stack}.{first}–{stack}.{first + 1}, attention"
        for stack in ("text.layers", "vision.blocks")
        for first in (0, 2)
    ]
    gpt2 = cells_of(["transformer.h.0.attn.c_attn", "transformer.h.0.mlp.c_fc", "transformer.h.0.ln_1"], 2)
    assert [cell.name for cell in gpt2] == ["layer 0, attention", "layer 0, mlp", "layer 0, other"]


@pytest.mark.parametrize("rule", [*RULES, "slerp of two", "all"])
def test_a_candidate_is_written_as_it_was_scored(rule: str, recipe: WriteRecipe, tmp_path: Path) -> None:
    names = ("sort", "add") if rule == "slerp of two" else NAMES  # of which `add` has no MLP
    file = recipe("linear", names)
    start = start_of(file)
    chosen = RULES if rule == "all" else tuple(dict.fromkeys([rule.split()[0], "linear"]))
    space = Space(start, 3, chosen)
    values = space.draw(Drawn(1, chosen))
    blocks = space.blocks(values)
    scored, served = Merger(start).factors(blocks), merged(write(file, blocks, start, tmp_path), "r-enmp")
    assert set(scored) == set(served)
    for module, pair in scored.items():
        expected = pair.delta()
        assert torch.allclose(served[module].delta(), expected, atol=2e-5 * float(expected.abs().max())), module
    unchanged = {m for cell in space.cells for m in cell.modules if values[cell.name] == NONE}
    assert set(scored) == set(start.modules) - unchanged
    assert len(space.words(values)) == len(space.cells)


def test_the_first_candidates_are_the_rules_by_themselves(recipe: WriteRecipe) -> None:
    start = start_of(recipe("linear", NAMES))
    first = Space(start, 2, (*PUBLISHED, NONE)).first
    assert [{value for value in one.values() if isinstance(value, str)} for one in first] == [{n} for n in PUBLISHED]
    assert first[0] == {
        "layers 0–2, attention": "task_arithmetic",
        "layers 0–2, attention: task_arithmetic lambda": 1.0,
        "layers 0–2, mlp": "task_arithmetic",
        "layers 0–2, mlp: task_arithmetic lambda": 1.0,
        "layers 3–4, attention": "task_arithmetic",
        "layers 3–4, attention: task_arithmetic lambda": 1.0,
        "layers 3–4, mlp": "task_arithmetic",
        "layers 3–4, mlp: task_arithmetic lambda": 1.0,
    }
    weights = {key.rpartition(" ")[2] for key in first[3] if "linear weight" in key and "mlp" in key}
    assert weights == {"upper"}  # the others have nothing there to weigh


def test_one_rule_is_one_stage_however_many_cells_take_it(recipe: WriteRecipe, tmp_path: Path) -> None:
    file = recipe("linear", NAMES)
    start = start_of(file)
    space = Space(start, 5, ("ties", "linear"))
    blocks = space.blocks(space.draw(Drawn(3, ("ties", "linear", "ties"))))
    assert [source.name for source in blocks.used] == ["ties", "linear"]
    assert len(merged(write(file, blocks, start, tmp_path), "r-enmp")) == len(start.modules)


def test_what_is_refused(recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    start = start_of(recipe("linear", NAMES))
    with pytest.raises(UserInputError, match=r"--rules: dare is unknown; rules: task_arithmetic, ties, slerp, linear"):
        Space(start, 2, ("ties", "dare"))
    with pytest.raises(UserInputError, match=r"--rules: gives nothing that merges; add one of"):
        Space(start, 2, (NONE,))
    monkeypatch.setattr("vllm_merge.tuning.layerwise.MAX_BYTES", 2000)
    Space(start, 1, ("ties",))
    with pytest.raises(UserInputError, match=r"--groups: the recipe's stages could have .* give fewer groups"):
        Space(start, 5, PUBLISHED)
