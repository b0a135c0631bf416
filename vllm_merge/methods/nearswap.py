# SPDX-License-Identifier: Apache-2.0
"""NearSwap: the first adapter, drawn towards the second by at most t per entry, as in mergekit.

Between models it depends on their difference alone, in which W₀ cancels: on weight changes it is exactly mergekit's merge of
the whole models.
"""

from __future__ import annotations

from typing import Annotated

from annotated_types import Gt
from torch import Tensor

from vllm_merge.algebra.tiles import Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.pairs import check_pair
from vllm_merge.methods.registry import merge_method


@merge_method(
    "nearswap",
    spaces=("delta",),
    reference="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    statistics=check_pair("nearswap"),
    entrywise=True,
    most_adapters=2,
    ordered=True,
)
def nearswap(
    tile: Tile,
    statistics: None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    t: Annotated[Tensor, PerAdapter(1e-4), Gt(0)],
) -> Tensor:
    """The first adapter's entries, moved towards the second's by at most t: entries that are near are swapped.

    ΔW = ΔW_1 + clip(ΔW_2 − ΔW_1, −t, t), and so for the whole weights, as W₀ is in both. t: in units of the weights; of the
    recipe, or of the second adapter. weight: multiplies an adapter's change before.
    """
    values = weight * tile.values
    if values.shape[1] == 1:
        return values[:, 0]
    step = t[:, 1]
    return values[:, 0] + (values[:, 1] - values[:, 0]).clamp(-step, step)
