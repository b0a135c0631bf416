# SPDX-License-Identifier: Apache-2.0
"""What merge_speed.py measures: the merges, their goals, and the least bytes and operations each of them needs.

The goals are seconds for 8 adapters of rank 16 on the 224 modules of a Llama-3-8B shape, on one H100.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from shapes import ModelShape

from vllm_merge import list_methods

SVD = 20  # operations of a small SVD over K³ (Golub and Van Loan, Matrix Computations, table 8.6.1)
OVERSAMPLING = 16  # columns that a range finder needs beyond the rank, at the least: the engine takes more
TABLE = ("8b", 8, 16)  # what the goals are for: shape, adapters, rank
GIB = 1 << 30


@dataclass(frozen=True)
class Case:
    """One way to merge. goal: seconds. closed: no iteration, so that it has a goal on a CPU too.

    only_n: how many adapters it takes, where not any number. steps_on: what its 100 steps of descent work on, for its floor.
    workspace_goal: bytes.
    """

    name: str
    method: str
    space: str
    rank: int | str = "lossless"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    goal: float | None = None
    closed: bool = True
    only_n: int | None = None
    steps_on: str = ""
    workspace_goal: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Of `vllm_merge.merge`."""
        return {
            "merge_method": self.method,
            "space": self.space,
            "rank": self.rank,
            "parameters": dict(self.parameters),
        }


CASES = (
    # All terms fit into the rank that `auto` allows: they are put side by side, and nothing is lost.
    Case("linear", "linear", "core", rank="auto", goal=0.0008),
    Case("task_arithmetic", "task_arithmetic", "core", rank="auto", goal=0.0008),
    Case("knots_ties", "ties", "knots", goal=0.050),
    Case("knots_ties_r64", "ties", "knots", rank=64, goal=0.070),
    Case("delta_ties_r64", "ties", "delta", rank=64, goal=1.5, workspace_goal=4 * GIB),
    Case("tsv_m", "tsv_m", "core", goal=0.040),
    Case("iso_c", "iso_c", "core", goal=0.040),
    Case("iso_cts", "iso_cts", "core", goal=0.040),
    Case("delta_dare_ties_r64", "dare_ties", "delta", rank=64, goal=1.5, workspace_goal=4 * GIB),
    Case("ctm", "ctm", "core", goal=0.150, closed=False),
    Case("do_decouple", "do_merging", "knots", rank="auto", parameters={"orthogonalize": "none"}, goal=0.015),
    Case("do_descent", "do_merging", "knots", rank="auto", goal=0.050, closed=False, steps_on="grams"),
    Case(
        "do_adam",
        "do_merging",
        "knots",
        parameters={"orthogonalize": "adam"},
        goal=0.800,
        closed=False,
        steps_on="factors",
    ),
    Case("knots_ties_r16", "ties", "knots", rank=16, goal=0.070),
    Case("knots_ties_r32", "ties", "knots", rank=32, goal=0.070),
    Case("core_ties", "ties", "core"),
    Case("knots_dare_ties", "dare_ties", "knots"),
    Case("knots_dare_linear", "dare_linear", "knots"),
    Case("doge", "doge", "core", closed=False, steps_on="grams"),
)


def registered_cases() -> list[Case]:
    """CASES, without those whose method is not there, and the other registered methods in their default space.

    What joins `core` inherits the goal of the closed forms there.
    """
    known = {spec.name: spec for spec in list_methods()}
    cases = [case for case in CASES if case.method in known and case.space in known[case.method].spaces]
    for name in sorted(known.keys() - {case.method for case in cases}):
        spec = known[name]
        dense = spec.default_space == "delta"
        cases.append(
            Case(
                name,
                name,
                spec.default_space,
                rank=64 if dense else "lossless",
                goal=1.5 if dense else 0.040 if spec.default_space == "core" else None,
                only_n=spec.most_adapters,
                workspace_goal=4 * GIB if dense else None,
            )
        )
    return sorted(cases, key=lambda case: case.goal is None)


@dataclass(frozen=True, slots=True)
class Work:
    """The least that a merge must do: bytes read and written; products of bfloat16 inputs; operations in float32."""

    bytes: float
    half: float
    single: float

    @classmethod
    def of(cls, case: Case, shape: ModelShape, n: int, r: int, result: int, element_bytes: int = 2) -> Work:
        """Every factor is read once and the result, of rank `result`, written once; a multiplication and an addition are
        two operations.

        Grams of the stacks and the result's factors: every rule but weighted sums and rules on factors. `delta` makes
        every ΔW_i three times (threshold, range finder, projection), since it is never stored.
        """
        k = n * r
        moved = half = single = 0.0
        for _, rows, columns in shape.modules():
            side = rows + columns
            rank = min(result, rows, columns)
            moved += (k + rank) * side * element_bytes
            if case.method in ("linear", "task_arithmetic") or case.space == "factors":
                continue
            if case.space == "delta":
                passes = 3 if case.parameters.get("trim", "global") == "global" else 2
                half += passes * 2 * k * rows * columns
                single += 2 * 2 * (rank + OVERSAMPLING) * rows * columns
                continue
            half += k * k * side  # Grams are symmetric
            single += 2 * k * rank * side + SVD * k**3
            if case.space == "knots":
                single += 2 * k * k * columns + k * k * columns  # every Z_i, and the Gram matrix of what is merged
            if case.steps_on == "grams":
                single += 100 * 2 * 2 * k**3
            if case.steps_on == "factors":
                single += 100 * 2 * 2 * k * k * side
        return cls(moved, half, single)


def by_names(names: list[str] | None) -> Iterator[Case]:
    """The cases of these names, or of these methods; all without names. Raises ValueError for an unknown one."""
    cases = registered_cases()
    unknown = set(names or ()) - {case.name for case in cases} - {case.method for case in cases}
    if unknown:
        raise ValueError(f"unknown: {', '.join(sorted(unknown))} (known: {', '.join(case.name for case in cases)})")
    for case in cases:
        if names is None or case.name in names or case.method in names:
            yield case
