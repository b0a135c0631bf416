# SPDX-License-Identifier: Apache-2.0
"""Compatibility with PEFT as of August 2026, whose `svd` and linear `*_svd` combinations multiply by alpha / r twice.

Its release 0.21.2 no longer does. `ties_by_count` has a parameter of its own for it, because signs are elected before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.methods.preconditions import Context, precondition


@precondition("peft_double_scaling")
def peft_double_scaling(adapters: Sequence[Adapter], context: Context) -> list[Mapping[str, LoraFactors]]:
    """ΔW_i = s_i² B_i A_i in place of s_i B_i A_i."""
    return [
        {module: LoraFactors(f.A, f.B, f.scaling**2) for module, f in adapter.factors.items()} for adapter in adapters
    ]
