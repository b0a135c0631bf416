# SPDX-License-Identifier: Apache-2.0
"""What the plots and the page of an adapter or a merge are made from: the facts of `vllm-merge inspect --json`, arranged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

NAN = float("nan")
_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
RESULT = "result"


@dataclass(frozen=True, slots=True)
class Grid:
    """A figure for every module: rows by kind of module, columns by layer; nan where there is none.

    share: the values are shares of 1. low: what the colours begin at.
    """

    title: str
    kinds: Sequence[str]
    layers: Sequence[str]
    values: Sequence[Sequence[float]]
    share: bool = False
    low: float = 0.0


@dataclass(frozen=True, slots=True)
class Square:
    """A figure for every two of `names`; the diagonal is 1. low: the least value there can be."""

    title: str
    names: Sequence[str]
    values: Sequence[Sequence[float]]
    low: float


@dataclass(frozen=True, slots=True)
class Norms:
    """‖ΔW‖_F of every layer, by name: of the adapters, and of the result."""

    layers: Sequence[str]
    lines: Mapping[str, Sequence[float]]


def place(module: str) -> tuple[str, str]:
    """The kind of a module and its layer: `model.layers.3.mlp.up_proj` is ("mlp.up_proj", "3")."""
    found = _LAYER.match(module)
    return (found[3], found[2]) if found else (module, "–")


def grids(facts: Mapping[str, Any]) -> Iterator[Grid]:
    """Norm, effective rank, energy kept and sign conflict of every module, as far as they are known and vary."""
    report = facts.get("report") or {}
    modules = facts["modules"]
    kept = report.get("energy_kept", {})
    yield _grid("norm of the weight change", {module: row["norm"] for module, row in modules.items()})
    if report.get("effective_rank"):
        yield _grid("effective rank", {module: report["effective_rank"].get(module, NAN) for module in modules})
    else:
        yield _grid("rank", {module: float(row["rank"]) for module, row in modules.items()})
    if any(share is not None for share in kept.values()):
        shares = {module: kept.get(module) for module in modules}
        known = {module: 1.0 if share is None else share for module, share in shares.items()}
        yield _grid("energy kept", known, share=True, low=0.5 if min(known.values()) > 0.5 else 0.0)
    if report.get("sign_conflict"):
        conflicts = {module: report["sign_conflict"].get(module, NAN) for module in modules}
        yield _grid("sign conflict", conflicts, share=True)


def _grid(title: str, values: Mapping[str, float], share: bool = False, low: float = 0.0) -> Grid:
    places = {place(module): value for module, value in values.items()}
    kinds = list(dict.fromkeys(kind for kind, _ in places))
    layers = sorted({layer for _, layer in places}, key=lambda layer: (not layer.isdigit(), layer.zfill(6)))
    return Grid(
        title, kinds, layers, [[places.get((kind, layer), NAN) for layer in layers] for kind in kinds], share, low
    )


def squares(facts: Mapping[str, Any]) -> Iterator[Square]:
    """Cosines of the adapters and the result over the whole model, and the overlaps of the adapters' spaces."""
    report = facts.get("report") or {}
    overall = report.get("overall") or {}
    names = report.get("adapters", [])
    if not overall or len(names) < 2:
        return
    cosines = _square(overall["cosines"], len(names))
    with_result = [NAN if value is None else value for value in overall["result_cosines"]]
    rows = [[*row, last] for row, last in zip(cosines, with_result, strict=True)]
    yield Square("cosine", [*names, RESULT], [*rows, [*with_result, 1.0]], -1.0)
    yield Square("overlap of output spaces", names, _square(overall["column_overlaps"], len(names)), 0.0)
    yield Square("overlap of input spaces", names, _square(overall["row_overlaps"], len(names)), 0.0)


def _square(pairs: Sequence[float | None], n: int) -> list[list[float]]:
    """The values of the pairs i < j as a symmetric matrix with a diagonal of 1."""
    values = iter(NAN if value is None else value for value in pairs)
    square = [[1.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1, n):
            square[i][j] = square[j][i] = next(values)
    return square


def norms(facts: Mapping[str, Any]) -> Norms | None:
    """Of a merge, how large every adapter and the result are in every layer."""
    report = facts.get("report") or {}
    names, inputs = report.get("adapters", []), report.get("input_norms", {})
    if not inputs:
        return None
    squares: dict[str, dict[str, float]] = {name: {} for name in (*names, RESULT)}
    for module, mine in inputs.items():
        _, layer = place(module)
        for name, value in zip((*names, RESULT), (*mine, report["norms"].get(module, 0.0)), strict=True):
            squares[name][layer] = squares[name].get(layer, 0.0) + value**2
    layers = sorted(squares[RESULT], key=lambda layer: (not layer.isdigit(), layer.zfill(6)))
    return Norms(layers, {name: [mine[layer] ** 0.5 for layer in layers] for name, mine in squares.items()})
