# SPDX-License-Identifier: Apache-2.0
"""Seeded masks: the same wherever and however they are drawn, and as random as they should be."""

from __future__ import annotations

import pytest
import torch

from tests.adapters_in_memory import map_factors, random_adapter
from vllm_merge import Adapter, LoraFactors
from vllm_merge.algebra.masks import keep_mask, mask_identity, mask_keys

WHOLE = slice(0, 400), slice(0, 300)


def draw(keys: torch.Tensor, density: float = 0.3, rows: slice = WHOLE[0], cols: slice = WHOLE[1]) -> torch.Tensor:
    return keep_mask(keys, torch.full((1, 1, 1, 1), density), rows, cols)


def test_a_recorded_mask() -> None:
    """The generator is part of what a digest stands for: it must not change."""
    keys = mask_keys(7, ["ab"], ["m"])
    assert keys.tolist() == [[246885070822800070]]
    mask = draw(keys, 0.5, slice(0, 2), slice(0, 12))
    assert "".join(str(int(kept)) for kept in mask.flatten()) == "101011110100011000010001"


def test_pieces_are_those_of_the_whole() -> None:
    keys = mask_keys(0, ["a", "b"], ["m0", "m1", "m2"])
    whole = draw(keys)
    assert whole.shape == (3, 2, 400, 300)
    for rows, cols in ((slice(17, 60), WHOLE[1]), (WHOLE[0], slice(299, 300)), (slice(3, 4), slice(5, 250))):
        assert torch.equal(draw(keys[1:], 0.3, rows, cols), whole[1:, :, rows, cols])


@pytest.mark.parametrize("density", [0.01, 0.3, 0.9])
def test_rates(density: float) -> None:
    """Of all entries, of rows, and of columns: within five standard deviations."""
    mask = draw(mask_keys(3, ["a"], ["m"]), density)[0, 0].double()
    for rate, count in ((mask.mean(), 120_000), (mask.mean(0), 400), (mask.mean(1), 300)):
        assert (rate - density).abs().max() < 5 * (density * (1 - density) / count) ** 0.5


def test_all_are_kept_at_density_1() -> None:
    assert draw(mask_keys(3, ["a"], ["m"]), 1.0).all()


def test_masks_of_other_keys_are_independent() -> None:
    seeds = [mask_keys(seed, ["a", "b"], ["m", "n"]).flatten() for seed in (0, 1)]
    masks = draw(torch.cat(seeds)[:, None], 0.5).flatten(1).double() - 0.5
    correlation = 4 * masks @ masks.T / masks.shape[1]
    assert (correlation - torch.eye(8)).abs().max() < 5 / masks.shape[1] ** 0.5


def test_neighbours_are_independent() -> None:
    mask = draw(mask_keys(0, ["a"], ["m"]), 0.5)[0, 0].double() - 0.5
    for other in (mask.roll(1, 0), mask.roll(1, 1), mask.roll((1, -1), (0, 1)), mask.roll((2, 4), (0, 1))):
        assert abs(4 * float((mask * other).mean())) < 5 / mask.numel() ** 0.5


def test_an_adapter_is_its_content() -> None:
    x = random_adapter("x", 3, 1, scaling=2.0)
    assert mask_identity(x) == mask_identity(map_factors(x, LoraFactors.folded))
    assert mask_identity(x) == mask_identity(Adapter("other", x.factors))
    assert mask_identity(x) != mask_identity(random_adapter("x", 3, 2))
    before = mask_identity(x)
    assert x.content_hash != before  # asking for the hash of the content changes nothing
    assert mask_identity(x) == before
    assert mask_identity(Adapter("x", x.factors, content_hash="given")) == "given"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_on_a_gpu() -> None:
    keys = mask_keys(0, ["a", "b"], ["m0", "m1"])
    density = torch.full((1, 1, 1, 1), 0.3)
    assert torch.equal(keep_mask(keys.cuda(), density.cuda(), *WHOLE).cpu(), keep_mask(keys, density, *WHOLE))
