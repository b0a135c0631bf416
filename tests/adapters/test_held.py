# SPDX-License-Identifier: Apache-2.0
"""Adapters that stay in the stacks they were made as."""

from __future__ import annotations

import pytest
import torch

from tests.adapters_in_memory import SHAPES, three
from vllm_merge import Adapter
from vllm_merge.adapters.held import HeldFactors, HeldStacks, held_stacks
from vllm_merge.adapters.stacking import ModuleGroup, group_modules, stack_group

CPU = torch.device("cpu")
LACKING = "layers.1.q_proj"


def two() -> list[Adapter]:
    """The second lacks a module."""
    x, y = three()[:2]
    return [x, Adapter("y", {m: f for m, f in y.factors.items() if m != LACKING})]


def held(adapters: list[Adapter], modules_at_once: int) -> list[Adapter]:
    """The same adapters in stacks of at most this many modules."""
    pieces = [piece for group in group_modules(adapters) for piece in group.batches(modules_at_once)]
    stacks = HeldStacks([stack_group(piece, adapters, CPU) for piece in pieces])
    return [Adapter(adapter.name, stacks.of(index)) for index, adapter in enumerate(adapters)]


@pytest.mark.parametrize("modules_at_once", [1, 2])
def test_they_are_the_adapters(modules_at_once: int) -> None:
    """With the scaling in B, in natural order, without what an adapter lacks."""
    for adapter, same in zip(two(), held(two(), modules_at_once), strict=True):
        assert list(same.factors) == list(adapter.factors)
        assert len(same.factors) == len(adapter.factors)
        assert same.layout == adapter.layout
        assert same.content_hash == Adapter("", {m: f.folded() for m, f in adapter.factors.items()}).content_hash
        assert same.factors["layers.0.q_proj"] is same.factors["layers.0.q_proj"]
        assert "other" not in same.factors
    with pytest.raises(KeyError):
        same.factors[LACKING]


@pytest.mark.parametrize("modules_at_once", [1, 2])
def test_their_stacks_are_taken_as_they_are(modules_at_once: int) -> None:
    adapters = held(two(), modules_at_once)
    stacks = held_stacks(adapters)
    assert stacks is not None
    for group in group_modules(adapters):
        found, made = stacks.stack(group, CPU), stack_group(group, two(), CPU)
        assert found is not None
        assert torch.equal(found.A, made.A)
        assert torch.equal(found.B, made.B)
        shares_memory = {stack.A.data_ptr() for stack in stacks.stacks} >= {found.A.data_ptr()}
        assert shares_memory == (modules_at_once == 2)
        last = stacks.stack(group.of([1]), CPU)
        assert last is not None
        assert torch.equal(last.A, made.A[1:])
        assert last.group.modules == group.modules[1:]
    assert not any(adapter.factors._made for adapter in adapters if isinstance(adapter.factors, HeldFactors))


def test_where_they_lie_otherwise() -> None:
    adapters = held(two(), 2)
    stacks = held_stacks(adapters)
    assert stacks is not None
    group = next(group for group in group_modules(adapters) if LACKING in group.modules)
    without_padding = next(piece for piece in group.by_ranks() if piece.modules == (LACKING,))
    assert stacks.stack(without_padding, CPU) is None
    assert stacks.stack(group, torch.device("meta")) is None
    turned = ModuleGroup(group.shape, group.modules[::-1], group.ranks[::-1], group.slots)
    found = stacks.stack(turned, CPU)
    assert found is not None
    assert torch.equal(found.A, stack_group(turned, two(), CPU).A)


def test_only_all_of_them_in_their_order() -> None:
    x, y = held(two(), 2)
    assert held_stacks([x, y]) is not None
    assert held_stacks([y, x]) is None
    assert held_stacks([x]) is None
    assert held_stacks([x, two()[1]]) is None
    assert held_stacks([x, held(two(), 2)[1]]) is None
    assert held_stacks(two()) is None
    assert set(SHAPES) == set(x.factors)
