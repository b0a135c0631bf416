# SPDX-License-Identifier: Apache-2.0
"""Model Breadcrumbs: drop each task's smallest entries and its outliers (Davari and Belilovsky, ECCV 2024, arXiv:2312.06795).

Module by module as in mergekit, whose sum of few entries is the paper's with the sparsity and outliers of one layer.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.bands import Bands, share_of
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


def without_outliers(passes: Passes, *, rescale: bool, **others: object) -> Bands:
    """⌊d · density⌋ of d entries, at least one, after the ⌊d · gamma⌋ largest, of which fewer are dropped if too few were left."""
    entries, density = passes.entries, passes.parameters["density"]
    count = share_of(entries, density).clamp_min(1)
    dropped = torch.minimum(share_of(entries, passes.parameters["gamma"]), entries[:, None] - count)
    dropped = torch.where(density == 1, 0, dropped)
    return Bands(passes, entries, dropped + 1, dropped + count, rescale=rescale)


@merge_method(
    "breadcrumbs",
    spaces=("delta", "knots", "core"),
    reference="arXiv:2312.06795",
    statistics=without_outliers,
    entrywise=True,
    on_the_fly=True,
)
def breadcrumbs(
    tile: Tile,
    bands: Bands,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.9), Gt(0), Le(1)],
    gamma: Annotated[Tensor, PerAdapter(0.01), Ge(0), Lt(1)],
    rescale: bool = False,
) -> Tensor:
    """Drop each task's smallest entries and its outliers in every module, and sum the rest.

    density: share of a task's entries that is kept. gamma: share that is dropped from the top. rescale: give what is kept
    the L1 norm that the task had at the module.
    """
    return bands.total(tile)


@merge_method(
    "breadcrumbs_ties",
    spaces=("delta", "knots", "core"),
    reference="arXiv:2312.06795",
    statistics=without_outliers,
    entrywise=True,
    on_the_fly=True,
)
def breadcrumbs_ties(
    tile: Tile,
    bands: Bands,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.9), Gt(0), Le(1)],
    gamma: Annotated[Tensor, PerAdapter(0.01), Ge(0), Lt(1)],
    normalize: bool = False,
    rescale: bool = False,
) -> Tensor:
    """Drop each task's smallest entries and its outliers, elect a sign per entry, and sum the tasks that agree.

    density, gamma, rescale: see breadcrumbs; gamma 0 is TIES as mergekit has it. normalize: the mean of the tasks that
    agree, weighted by |w_i|, in place of their weighted sum.
    """
    return bands.elected(tile, normalize=normalize)
