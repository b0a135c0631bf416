# SPDX-License-Identifier: Apache-2.0
"""Consensus: keep the entries that several tasks want (Wang et al., ICML 2024, arXiv:2405.07813, §4.3).

A task wants an entry where the merged value is closer to its own than nothing is (its TALL mask). Entries that too few want, which
are noise or of use to one task alone, are removed from the sum; no task has to be known when it is served.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt
from torch import Tensor

from vllm_merge.algebra.tiles import Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method(
    "consensus", spaces=("delta", "knots", "core"), reference="arXiv:2405.07813", entrywise=True, on_the_fly=True
)
def consensus(
    tile: Tile,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    strictness: Annotated[Tensor, PerAdapter(0.4), Gt(0)],
    agreement: Annotated[int, Ge(1)] = 2,
) -> Tensor:
    """The weighted sum, only at entries that at least `agreement` tasks want; of fewer tasks, all of them.

    Task i wants an entry where |x_i| > strictness · |Σ w_j x_j − x_i|: the larger strictness, the fewer it wants (λ_t of the
    paper, 0.2 to 0.6 there).
    """
    enough = min(agreement, tile.values.shape[1])
    if tile.values.is_meta:
        from vllm_merge.kernels import agreement as kernels

        return kernels.wanted(tile.products(), weight[:, :, 0, 0], strictness[:, :, 0, 0], enough)
    values = tile.values.float()
    total = (weight * values).sum(1)
    wanted = values.abs() > strictness * (total[:, None] - values).abs()
    return total * (wanted.sum(1) >= enough)
