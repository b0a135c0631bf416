# SPDX-License-Identifier: Apache-2.0
"""SSR and RegMean in the Python interface: preconditions that correct adapters by the inputs of their modules.

    merge(adapters, merge_method="task_arithmetic", precondition=[ssr_correction(inputs)])
is SSR-Merge (arXiv:2606.10617): the sum of B_i A'_i, with A' = R [A_1; …; A_n].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.errors import UserInputError
from vllm_merge.methods.preconditions import Context
from vllm_merge.tuning.branches import Terms
from vllm_merge.tuning.statistics import RIDGE, Moments, RegMean, Ssr


@dataclass(frozen=True)
class Correction:
    """inputs: {adapter: {module: (tokens, d_in)}}, what each module is given while that adapter is active."""

    inputs: Mapping[str, Mapping[str, Tensor]]
    empty: Callable[[Tensor, Tensor, Tensor], Moments]
    name: str

    def __call__(self, adapters: Sequence[Adapter], context: Context) -> list[Adapter]:
        """The adapters with A' for A; B stays, with the scaling folded in. Raises UserInputError for missing inputs."""
        found: dict[str, Tensor] = {}
        for module in dict.fromkeys(module for adapter in adapters for module in adapter.factors):
            terms = Terms.of(adapters, module, context.device)
            statistics = self.empty(terms.A, terms.B, terms.owner)
            for index, adapter in enumerate(adapters):
                if module not in self.inputs.get(adapter.name, {}):
                    raise UserInputError(
                        f"there are no inputs of adapter {adapter.name!r} at module {module!r}; give (tokens, d_in) for each "
                        "adapter and module, those that the adapter does not change too"
                    )
                statistics.add(self.inputs[adapter.name][module].to(context.device), index)
            found[module] = statistics.solved()
        return corrected(adapters, found)

    def __repr__(self) -> str:
        return f"{self.name} of inputs"


def ssr_correction(inputs: Mapping[str, Mapping[str, Tensor]], ridge: float = RIDGE) -> Correction:
    """SSR of these inputs, for `merge(…, precondition=[…])`. ridge: added to the mean of z zᵀ, absolute."""
    return Correction(inputs, partial(Ssr.empty, ridge=ridge), "ssr")


def regmean_correction(inputs: Mapping[str, Mapping[str, Tensor]]) -> Correction:
    """RegMean of these inputs, for `merge(…, precondition=[…])`."""
    return Correction(inputs, RegMean.empty, "regmean")


def corrected(adapters: Sequence[Adapter], found: Mapping[str, Tensor]) -> list[Adapter]:
    """The adapters with their rows of A' (K, d_in) for A, float32; modules that are not among those found stay."""
    factors = [{module: pair for module, pair in a.factors.items() if module not in found} for a in adapters]
    for module, a in found.items():
        start = 0
        for index, adapter in enumerate(adapters):
            if module in adapter.factors:
                pair = adapter.factors[module]
                end = start + pair.rank
                b = pair.B.float().to(a.device) * pair.scaling
                factors[index][module] = LoraFactors(a[start:end].float().clone(), b)
                start = end
    return [
        Adapter(adapter.name, mine, base_model=adapter.base_model)
        for adapter, mine in zip(adapters, factors, strict=True)
    ]
