# SPDX-License-Identifier: Apache-2.0
"""How the facts of a merge are arranged for plots."""

from __future__ import annotations

import math
from typing import Any

from tests.adapters_in_memory import three
from vllm_merge import merge
from vllm_merge.report.facts import grids, norms, place, squares


def facts(**arguments: Any) -> dict[str, Any]:
    merged = merge(three(), **{"merge_method": "task_arithmetic", "space": "delta", **arguments})
    modules = {m: {"norm": merged.report.norms[m], "rank": f.rank} for m, f in merged.factors.items()}
    return {"modules": modules, "report": merged.report.to_dict()}


def test_the_place_of_a_module() -> None:
    assert place("model.layers.11.mlp.up_proj") == ("mlp.up_proj", "11")
    assert place("layers.0.q_proj") == ("q_proj", "0")
    assert place("lm_head") == ("lm_head", "–")


def test_grids_of_a_merge() -> None:
    found = {grid.title: grid for grid in grids(facts(rank=2))}
    assert list(found) == ["norm of the weight change", "effective rank", "energy kept", "sign conflict"]
    kept = found["energy kept"]
    assert (list(kept.kinds), list(kept.layers), kept.share) == (["q_proj", "up_proj"], ["0", "1"], True)
    assert all(0 < value < 1 for row in kept.values for value in row)


def test_grids_leave_out_what_is_not_known() -> None:
    assert [grid.title for grid in grids(facts(merge_method="tsv_m", space=None))] == [
        "norm of the weight change",
        "effective rank",
    ]
    plain = {"modules": facts()["modules"]}
    assert [grid.title for grid in grids(plain)] == ["norm of the weight change", "rank"]
    assert norms(plain) is None
    assert list(squares(plain)) == []
    assert list(squares(facts(report="brief"))) == []


def test_layers_are_in_the_order_of_their_numbers() -> None:
    modules = {f"l.{layer}.a": {"norm": float(layer), "rank": 1} for layer in (10, 2, 0)}
    modules["lm_head"] = {"norm": 1.0, "rank": 1}
    first = next(grids({"modules": modules}))
    assert list(first.layers) == ["0", "2", "10", "–"]
    assert [v for v in first.values[0] if not math.isnan(v)] == [0.0, 2.0, 10.0]


def test_squares_are_symmetric_and_the_result_is_last() -> None:
    given = facts()
    cosine, columns, rows = squares(given)
    assert list(cosine.names) == ["x", "y", "z", "result"]
    assert (
        [cosine.values[i][3] for i in range(3)] == cosine.values[3][:3] == given["report"]["overall"]["result_cosines"]
    )
    for square in (cosine, columns, rows):
        assert all(square.values[i][j] == square.values[j][i] for i in range(3) for j in range(3))
        assert all(square.values[i][i] == 1.0 for i in range(3))
    assert columns.values[1][2] == given["report"]["overall"]["column_overlaps"][2]


def test_norms_by_layer() -> None:
    found = norms(given := facts())
    assert found is not None
    assert list(found.lines) == ["x", "y", "z", "result"]
    expected = sum(given["report"]["norms"][f"layers.1.{kind}"] ** 2 for kind in ("q_proj", "up_proj")) ** 0.5
    assert found.lines["result"][1] == expected
