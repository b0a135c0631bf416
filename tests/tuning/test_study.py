# SPDX-License-Identifier: Apache-2.0
"""Asking for candidates: Hyperband gives up on the worse ones early, and a study goes on from its record as if without a break."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from vllm_merge import MergeError
from vllm_merge.tuning.samples import sizes_of
from vllm_merge.tuning.study import Study

pytest.importorskip("optuna")
SIZES = [1, 3, 9, 27]
FIRST = [{"kind": "a", "x": 0.5}, {"kind": "b", "y": 1.5}]


def draw(chooser: Any) -> dict[str, Any]:
    kind = chooser.suggest_categorical("kind", ["a", "b"])
    name, high = ("x", 1.0) if kind == "a" else ("y", 2.0)
    return {"kind": kind, name: chooser.suggest_float(name, 0.0, high)}


def loss(values: dict[str, Any]) -> float:
    return abs(values["x"] - 0.3) if values["kind"] == "a" else 0.4 + values["y"]


class Bench:
    """Scores candidates, and notes how far each came."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict[str, Any], int]] = []

    def __call__(self, values: dict[str, Any], enough: Callable[[float, int], bool]) -> Sequence[float]:
        for size in SIZES:
            if enough(loss(values) * (1 + 0.1 / size), size):
                break
        self.seen.append((values, size))
        return [loss(values) * (1 + 0.1 / size)]


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (8, [1, 3, 8]), (27, [3, 9, 27]), (100, [12, 36, 100])]
)
def test_the_sizes_rise_to_all_prompts(most: int, sizes: list[int]) -> None:
    assert sizes_of(most) == sizes


def test_hyperband_looks_longer_at_what_is_better() -> None:
    study, bench = Study(draw, FIRST, SIZES, 1, "tpe", 0), Bench()
    ended = [study.candidate(bench) for _ in range(80)]
    assert [values for values, _, _ in ended[:2]] == FIRST
    came = [size for _, size in bench.seen]
    assert set(came) == set(SIZES)  # in the bracket of all prompts nothing is given up before the end
    assert came.count(27) == sum(whole for *_, whole in ended) == len(study.complete)
    assert came.count(27) < 40
    by_size = {size: [loss(values) for values, at in bench.seen if at == size] for size in SIZES}
    assert min(by_size[1]) > min(by_size[27])
    assert sum(by_size[27]) / len(by_size[27]) < sum(by_size[1]) / len(by_size[1])
    best = min(found[0] for _, _, found in study.complete)
    assert best < 0.03  # and not 0.5, as the first candidate has


def test_random_search_looks_at_everything() -> None:
    study, bench = Study(draw, FIRST, SIZES, 1, "random", 0), Bench()
    for _ in range(20):
        study.candidate(bench)
    assert [size for _, size in bench.seen] == [27] * 20
    assert [values for values, _ in bench.seen[:2]] == FIRST
    assert len({str(values) for values, _ in bench.seen}) == 20


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_it_goes_on_as_without_a_break(sampler: str) -> None:
    whole, begun, gone_on = Bench(), Bench(), Bench()
    study = Study(draw, FIRST, SIZES, 1, sampler, 3)
    for _ in range(50):
        study.candidate(whole)
    first, second = Study(draw, FIRST, SIZES, 1, sampler, 3), Study(draw, FIRST, SIZES, 1, sampler, 3)
    for _ in range(31):
        first.candidate(begun)
    second.load(first.record())
    assert (second.made, second.complete) == (31, first.complete)
    for _ in range(19):
        second.candidate(gone_on)
    assert begun.seen + gone_on.seen == whole.seen
    assert second.complete == study.complete
    other = Bench()
    reseeded = Study(draw, FIRST, SIZES, 1, sampler, 4)
    for _ in range(5):
        reseeded.candidate(other)
    assert other.seen[2:] != whole.seen[2:5]


def test_candidates_without_a_value_are_passed_over() -> None:
    study = Study(draw, [], SIZES, 1, "tpe", 0)
    for number in range(12):
        _, found, whole = study.candidate(lambda values, enough: None)
        assert (found, whole, study.made) == (None, False, number + 1)
    study.candidate(Bench())
    again = Study(draw, [], SIZES, 1, "tpe", 0)
    again.load(study.record())
    assert again.made == 13
    assert again.complete == study.complete


def test_of_several_objectives_none_is_given_up() -> None:
    def two(values: dict[str, Any], enough: Callable[[float, int], bool]) -> Sequence[float]:
        assert not any(enough(1.0, size) for size in SIZES)
        x = values.get("x", 2.0)
        return [x, (1 - x) ** 2 + (values["kind"] == "b")]

    study = Study(draw, FIRST, SIZES, 2, "tpe", 0)
    made = [study.candidate(two) for _ in range(30)]
    assert [(values, found) for _, values, found in study.complete] == [(values, found) for values, found, _ in made]
    assert sum(values["kind"] == "a" for values, _, _ in made[15:]) > 10  # which has the better of both


def test_without_optuna_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MergeError, match=r"optuna is not installed.*pip install 'vllm-merge\[tune\]'"):
        Study(draw, FIRST, SIZES, 1, "tpe", 0)
