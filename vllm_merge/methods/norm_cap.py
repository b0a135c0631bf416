# SPDX-License-Identifier: Apache-2.0
"""Precondition norm_cap: shrink what is far longer than the others, stretch nothing.

One adapter much longer than the rest decides the signs, the singular directions and the sum of nearly every method. The
cap is robust: median + 3·MAD of the adapters' norms at a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import group_modules, stack_group
from vllm_merge.algebra.coordinates import Grams
from vllm_merge.methods.preconditions import Context, precondition


@precondition("norm_cap")
def norm_cap(
    adapters: Sequence[Adapter], context: Context, *, mads: Annotated[float, Ge(0)] = 3.0
) -> list[dict[str, LoraFactors]]:
    """Scale ΔW_i down to ‖ΔW_i‖_F ≤ median + mads · MAD, over the adapters that have the module.

    MAD is the median of |‖ΔW_i‖_F − median|, with no factor. Of an even number the median is the mean of the middle two.
    """
    result = [dict(adapter.factors) for adapter in adapters]
    for group in group_modules(adapters):
        each = 8 * group.stacked_rank * (sum(group.shape) + 2 * group.stacked_rank)
        for batch in group.batches(max(1, context.workspace_bytes // (2 * each))):
            norms = Grams.of(stack_group(batch, adapters, context.device)).norms
            factors = torch.where(norms > 0, (_caps(norms, mads) / norms).clamp_max(1), 1.0).tolist()
            for module, row in zip(batch.modules, factors, strict=True):
                for own, factor in zip(result, row, strict=True):
                    if factor < 1:
                        old = own[module]
                        own[module] = LoraFactors(old.A, old.B, old.scaling * factor)
    return result


def _caps(norms: Tensor, mads: float) -> Tensor:
    """The largest norm allowed at each module, (modules, 1), from norms (modules, n) of which 0 do not count."""
    there = torch.where(norms > 0, norms, torch.nan)
    median = there.nanquantile(0.5, dim=1, keepdim=True)
    return median + mads * (there - median).abs().nanquantile(0.5, dim=1, keepdim=True)
