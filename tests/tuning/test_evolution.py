# SPDX-License-Identifier: Apache-2.0
"""The searches: what their candidates mean, that they find what there is to find, and that they go on where they ended."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_merge import MergeError, UserInputError
from vllm_merge.tuning.evolution import BOUND, MOST_PRUNED, enmp, lorahub
from vllm_merge.tuning.weights import Groups

pytest.importorskip("cmaes")
MODULES = [f"model.layers.{layer}.{name}" for layer in range(5) for name in ("q_proj", "up_proj")]
START = torch.full((len(MODULES), 4), 0.8, dtype=torch.float64)
BY_LAYER = Groups.of(MODULES, "layer")
EVERYWHERE = torch.ones(len(MODULES), 4, dtype=torch.bool)
BAD = {(0, 1), (3, 2)}  # layer, adapter


def harm(table: torch.Tensor) -> float:
    """Pairs of BAD that are left in, and others that are not."""
    pruned = {(i // 2, j) for i, j in (table == 0).nonzero().tolist()}
    return float(len(BAD - pruned) + 0.5 * len(pruned - BAD))


def test_enmp_finds_the_pairs_that_harm() -> None:
    """From every start one of the two at least, from about half both. From which hangs on how a processor rounds."""
    for seed in range(20):
        search = enmp(harm, BY_LAYER, START, EVERYWHERE, seed=seed)
        assert search.value() == 2.0
        while search.done < 40 and search.value() > 0:
            search.step()
        assert search.value() <= 1.0
        if search.value() == 0:
            break
    assert search.value() == 0.0
    table = search.learned().weights
    assert table is not None
    assert {(i // 2, j) for i, j in (table == 0).nonzero().tolist()} == BAD
    assert set(table.flatten().tolist()) == {0.0, 0.8}


def test_enmp_leaves_out_a_fifth_at_most() -> None:
    seen: list[int] = []

    def evaluate(table: torch.Tensor) -> float:
        seen.append(int((table == 0).sum()) // 2)
        return -float((table == 0).sum())

    search = enmp(evaluate, BY_LAYER, START, EVERYWHERE, seed=1)
    for _ in range(30):
        search.step()
    assert max(seen) == int(MOST_PRUNED * 20)


def test_pairs_without_a_module_do_not_count() -> None:
    present = torch.zeros_like(EVERYWHERE)
    present[:8, :2] = True
    search = enmp(lambda table: -float((table == 0).sum()), BY_LAYER, START, present, seed=0)
    for _ in range(20):
        search.step()
    table = search.learned().weights
    assert table is not None
    assert int((table == 0).sum()) // 2 == 1  # a fifth of eight
    assert not bool((table == 0)[~present].any())
    with pytest.raises(UserInputError, match="there are 4 pairs of a group and an adapter, too few"):
        enmp(harm, Groups.of(MODULES, "adapter"), START, EVERYWHERE, seed=0)


WANTED = torch.tensor([0.4, -0.2, 1.1, 0.0], dtype=torch.float64)


def distance(table: torch.Tensor) -> float:
    return float((table[0] - WANTED).square().sum())


def test_lorahub_finds_weights_and_pays_for_them() -> None:
    search = lorahub(distance, Groups.of(MODULES, "adapter"), START, seed=0)
    for _ in range(60):
        search.step()
    table = search.learned().weights
    assert table is not None
    assert torch.allclose(table[0], WANTED, atol=0.05)
    assert search.value() == pytest.approx(0.05 * float(table.abs().mean()), abs=0.01)
    assert float(table.abs().max()) <= BOUND


def test_it_goes_on_where_it_ended() -> None:
    whole, first, second = (lorahub(distance, Groups.of(MODULES, "adapter"), START, seed=5) for _ in range(3))
    whole.value()
    first.value()
    losses = [whole.step() for _ in range(8)]
    begun = [first.step() for _ in range(3)]
    second.load({name: value.clone() for name, value in first.state().items()}, first.done)
    assert begun + [second.step() for _ in range(5)] == losses
    assert torch.equal(second.learned().weights, whole.learned().weights)
    assert second.value() == whole.value()


def test_candidates_without_a_value_lose() -> None:
    def picky(table: torch.Tensor) -> float:
        if float(table.sum()) < 0:
            raise UserInputError("weights add up to 0")
        if float(table[0, 0]) > 0.5:
            raise MergeError("the merged weight change is not finite")
        return math.nan if float(table[0, 1]) > 0.5 else distance(table)

    search = lorahub(picky, Groups.of(MODULES, "adapter"), torch.zeros_like(START), seed=0)
    for _ in range(10):
        search.step()
    assert math.isfinite(search.value())
    broken = lorahub(lambda table: math.nan, Groups.of(MODULES, "adapter"), START, seed=0)
    assert math.isnan(broken.step())

    def fails(table: torch.Tensor) -> float:
        raise MergeError("the adapter is broken")

    with pytest.raises(MergeError, match="broken"):  # of the recipe itself
        lorahub(fails, Groups.of(MODULES, "adapter"), START, seed=0).value()
