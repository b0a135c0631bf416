# SPDX-License-Identifier: Apache-2.0
"""Exact selection over tiles."""

from __future__ import annotations

import pytest
import torch

from vllm_merge.algebra.selection import kth_largest


@pytest.mark.parametrize("modules", [3, 40])
def test_selects_what_sorting_selects(modules: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(modules, 2, 7, 9, generator=generator) * torch.logspace(-20, 10, 9)
    values[0, 0, 0] = values[0, 0, 1]  # ties

    def tiles():
        for start in range(0, modules, 2):
            piece = slice(start, min(start + 2, modules))
            yield values[piece], piece

    flat = values.abs().flatten(2)
    for k in (1, 5, 31, 63):
        within = kth_largest(tiles, torch.full((modules, 2), k))
        assert torch.equal(within, flat.sort(-1, descending=True).values[..., k - 1])
    over = values.abs().transpose(0, 1).flatten(1).sort(-1, descending=True).values
    counts = torch.tensor([[1, modules * 40]])
    assert torch.equal(kth_largest(tiles, counts)[0], torch.stack([over[0, 0], over[1, modules * 40 - 1]]))


def test_more_than_there_are_gives_zero() -> None:
    values = torch.ones(1, 1, 2, 2)
    assert kth_largest(lambda: [(values, slice(0, 1))], torch.tensor([[4]])).item() == 1.0
    assert kth_largest(lambda: [(values, slice(0, 1))], torch.tensor([[5]])).item() == 0.0
