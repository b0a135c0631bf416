# SPDX-License-Identifier: Apache-2.0
"""TIES: trim, elect signs, disjoint merge (Yadav et al., NeurIPS 2023, arXiv:2306.01708, §3).

In space `knots` it is KnOTS-TIES (arXiv:2410.19735, §4), in `core` Core-TIES (arXiv:2509.17786).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.selection import kth_largest
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@dataclass(frozen=True, slots=True)
class TiesStatistics:
    """threshold: smallest magnitude kept, (modules, n) float32. majority: sign taken where the weighted sum is exactly
    0, (modules,). sign_conflict: share of entries whose kept values differ in sign, (modules,)."""

    threshold: Tensor
    majority: Tensor
    sign_conflict: Tensor


def ties_statistics(passes: Passes, *, trim: str, normalize: bool) -> TiesStatistics:
    """Thresholds and votes, from passes over the entries of the whole model."""
    density = passes.parameters["density"]
    modules, n = density.shape
    whole_model = trim == "global" and bool((density == density[:1]).all())
    if whole_model:
        kept = _kept(passes.entries.sum()[None, None], density[:1])
    else:
        kept = _kept(passes.entries[:, None], density)
    threshold = kth_largest(lambda: _entries(passes), kept).expand(modules, n)
    votes, conflicts = passes.entries.new_zeros(modules), passes.entries.new_zeros(modules)
    for tile in passes.tiles():
        kept_values = _trimmed(tile, threshold) * tile.parameters["weight"]
        total = kept_values.sum(1)
        votes[tile.modules] += total.sign().sum((-1, -2)).long()
        conflicts[tile.modules] += (kept_values.abs().sum(1) > total.abs()).sum((-1, -2))
    majority = votes.sum().expand(modules) if whole_model else votes
    return TiesStatistics(threshold, majority.sign().float(), conflicts / passes.entries.clamp_min(1))


def _entries(passes: Passes) -> Iterator[tuple[Tensor, slice]]:
    for tile in passes.tiles():
        yield tile.values, tile.modules


def _kept(entries: Tensor, density: Tensor) -> Tensor:
    """⌊d·density⌋ + 1 entries, as the original keeps |x| ≥ the (d − ⌊d·density⌋)-th smallest."""
    return (entries * density.double()).long() + 1


def _trimmed(tile: Tile, threshold: Tensor) -> Tensor:
    values = tile.values.float()
    return torch.where(values.abs() >= threshold[tile.modules][:, :, None, None], values, 0.0)


@merge_method(
    "ties",
    spaces=("knots", "delta", "core"),
    reference="arXiv:2306.01708",
    statistics=ties_statistics,
    entrywise=True,
)
def ties(
    tile: Tile,
    statistics: TiesStatistics,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.2), Gt(0), Le(1)],
    normalize: bool = True,
    trim: Literal["global", "module"] = "global",
) -> Tensor:
    """Keep each task's largest entries, elect a sign per entry, average the entries that agree with it.

    density: share of a task's entries that is kept, over the whole model (trim: global) or in every module.
    normalize: the mean weighted by |w_i| of the tasks that agree; otherwise their weighted sum.
    """
    kept = _trimmed(tile, statistics.threshold) * weight
    total = kept.sum(1, keepdim=True)
    majority = statistics.majority[tile.modules][:, None, None, None]
    positive = torch.where(total == 0, majority, total) > 0
    agree = torch.where(positive, kept > 0, kept < 0)
    merged = torch.where(agree, kept, 0.0).sum(1)
    if not normalize:
        return merged
    divisor = (agree * weight.abs()).sum(1)
    return merged / torch.where(divisor > 0, divisor, 1.0)
