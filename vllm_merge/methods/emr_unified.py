# SPDX-License-Identifier: Apache-2.0
"""EMR's unified change: the elected sign, the largest magnitude that has it (Huang et al., NeurIPS 2024, arXiv:2405.17461).

EMR goes on to mask and rescale it for the task at hand, which has to be known with every request; a merged adapter has the
unified change alone.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vllm_merge.algebra.tiles import Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("emr_unified", spaces=("knots", "core", "delta"), reference="arXiv:2405.17461", entrywise=True)
def emr_unified(tile: Tile, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)]) -> Tensor:
    """The sign of the sum, with the largest magnitude among the tasks that have it.

    Larger than any average of the tasks: λ below 1 makes up for it.
    """
    values = weight * tile.values.float()
    elected = torch.where(values.sum(1) > 0, 1.0, -1.0)
    return elected * (values * elected[:, None]).clamp_min(0).amax(1)
