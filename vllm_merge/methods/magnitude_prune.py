# SPDX-License-Identifier: Apache-2.0
"""Magnitude pruning of the weight changes (Han et al., NeurIPS 2015, arXiv:1506.02626), then their sum.

By module it is PEFT's `magnitude_prune_svd`, but for the scaling, which PEFT applies twice. PEFT's `magnitude_prune` prunes A and B
apart.
"""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.bands import Bands, share_of
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


def largest(passes: Passes, *, trim: str) -> Bands:
    """⌊d · density⌋ of a task's d entries, at a module or in the whole model, at least one."""
    entries, density = passes.entries, passes.parameters["density"]
    if trim == "global" and bool((density == density[:1]).all()):
        entries, density = entries.sum(0, keepdim=True), density[:1]
    last = share_of(entries, density).clamp_min(1)
    return Bands(passes, entries, last.new_ones(last.shape), last, rescale=False)


@merge_method(
    "magnitude_prune",
    spaces=("knots", "core", "delta"),
    reference="arXiv:1506.02626",
    statistics=largest,
    entrywise=True,
    on_the_fly=True,
)
def magnitude_prune(
    tile: Tile,
    bands: Bands,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.2), Gt(0), Le(1)],
    trim: Literal["global", "module"] = "module",
) -> Tensor:
    """Keep each task's largest entries and sum: task arithmetic without the small entries.

    density: share of a task's entries that is kept, in every module (trim: module) or over the whole model; a density that
    differs by module trims by module.
    """
    return bands.total(tile)
