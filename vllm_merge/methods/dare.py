# SPDX-License-Identifier: Apache-2.0
"""DARE: drop entries at random and rescale the rest (Yu et al., ICML 2024, arXiv:2311.03099), then sum or TIES.

In space `knots` dare_ties is KnOTS-DARE-TIES (arXiv:2410.19735, §4), in `core` Core-DARE-TIES (arXiv:2509.17786).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import Stack
from vllm_merge.algebra.masks import keep_mask, mask_identity, mask_keys, mask_limits
from vllm_merge.algebra.passes import MappedPasses
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.preconditions import Context, change_stacks, precondition
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.rescaling import l1_factors
from vllm_merge.methods.ties import TiesStatistics, ties

if TYPE_CHECKING:
    from vllm_merge.kernels.products import Rule

Rescale = bool | Literal["l1"]


class DareMasks:
    """The keys of the masks, (all modules, n) int64: of the seed, the adapter's content and the module's name."""

    def __init__(self, passes: Passes, *, rescale: Rescale, **others: object) -> None:
        identities = [mask_identity(adapter) for adapter in passes.adapters]
        self._keys = mask_keys(passes.seed, identities, passes.modules).to(passes.entries.device)
        self._rescale = rescale
        self._factor: Tensor | None = None
        if rescale == "l1":
            self._factor = l1_factors(passes, self._masked, self.rule)

    def dropped(self, tile: Tile) -> Tile:
        """x ⊙ Bernoulli(density) / density; without rescale x ⊙ Bernoulli(density); l1: that with the L1 norm of x."""
        values = self._masked(tile)
        if self._factor is not None:
            return replace(tile, values=values.mul_(self._factor[tile.modules][:, :, None, None]))
        return replace(tile, values=values.div_(tile.parameters["density"]) if self._rescale else values)

    def rule(self, tile: Tile) -> Rule:
        """`dropped`, for entries that are made on the fly."""
        from vllm_merge.kernels.products import Rule

        weight, density = (tile.parameters[name][:, :, 0, 0] for name in ("weight", "density"))
        scale = 1 / density if self._rescale is True else None
        if self._factor is not None:
            scale = self._factor[tile.modules]
        return Rule(weight, scale, keys=self._keys[tile.modules], limits=mask_limits(density))

    def untrimmed(self, tile: Tile) -> Tile:
        """The entries that were not dropped, for TIES that trims none of them. On the fly, `rule` drops them."""
        if tile.values.is_meta:
            return tile
        dropped = self.dropped(tile)
        ones = torch.ones_like(tile.parameters["density"])
        return replace(dropped, parameters={**tile.parameters, "density": ones})

    def _masked(self, tile: Tile) -> Tensor:
        return tile.values * keep_mask(self._keys[tile.modules], tile.parameters["density"], tile.rows, tile.cols)


@merge_method(
    "dare_linear",
    spaces=("knots", "core", "delta"),
    reference="arXiv:2311.03099",
    statistics=DareMasks,
    entrywise=True,
    on_the_fly=True,
)
def dare_linear(
    tile: Tile,
    masks: DareMasks,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    rescale: Rescale = True,
) -> Tensor:
    """Keep a random share of each task's entries, rescale it by its inverse, and sum: task arithmetic plus noise.

    density: probability that an entry is kept, 1 − p of the paper. rescale: divide what is kept by it, so that the
    expectation is task arithmetic; l1: give what is kept the L1 norm that the task had at the module, as mergekit does.
    """
    if tile.values.is_meta:
        from vllm_merge.kernels.products import add

        return add(tile.products(), masks.rule(tile))
    return (weight * masks.dropped(tile).values).sum(1)


class DareTiesStatistics:
    """TIES on the entries that were not dropped; nothing is trimmed."""

    def __init__(self, passes: Passes, *, rescale: Rescale, **others: object) -> None:
        self.masks = DareMasks(passes, rescale=rescale)
        untrimmed = {"density": torch.ones_like(passes.parameters["density"])}
        mapped = MappedPasses(passes, self.masks.untrimmed, untrimmed)
        self.of_ties = TiesStatistics(mapped, trim="global", normalize=True, rule=self.masks.rule)

    @property
    def sign_conflict(self) -> Tensor:
        """Share of the kept entries whose adapters differ in sign, (all modules,)."""
        return self.of_ties.sign_conflict


@merge_method(
    "dare_ties",
    spaces=("knots", "core", "delta"),
    reference="arXiv:2311.03099",
    statistics=DareTiesStatistics,
    entrywise=True,
    on_the_fly=True,
)
def dare_ties(
    tile: Tile,
    statistics: DareTiesStatistics,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.5), Gt(0), Le(1)],
    rescale: Rescale = True,
    normalize: bool = True,
) -> Tensor:
    """Keep a random share of each task's entries, rescale it, elect a sign per entry, average those that agree.

    density: probability that an entry is kept. rescale: see dare_linear. normalize: the mean of the tasks
    that agree, weighted by |w_i|; otherwise their weighted sum.
    """
    whole = statistics.masks.untrimmed(tile)
    return ties(whole, statistics.of_ties, weight=weight, density=whole.parameters["density"], normalize=normalize)


@precondition("dare")
def dare(
    adapters: Sequence[Adapter],
    context: Context,
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.5,
) -> list[Mapping[str, LoraFactors]]:
    """B̃_i = B_i ⊙ Bernoulli(density) / density: every adapter keeps its rank, and E[B̃_i A_i] = ΔW_i.

    On factors, because dropping entries of ΔW itself leaves no LoRA.
    """
    identities = [mask_identity(adapter) for adapter in adapters]

    def drop(stack: Stack) -> tuple[Tensor, Tensor]:
        group = stack.group
        keys = mask_keys(context.seed, identities, group.modules).to(context.device)
        share = torch.full((), density, device=context.device)
        for index, slot in enumerate(group.slots):
            rows, cols = slice(0, group.shape[0]), slice(0, slot.stop - slot.start)
            mask = keep_mask(keys[:, index : index + 1], share, rows, cols)
            stack.B[:, :, slot].mul_(mask[:, 0]).div_(density)
        return stack.A, stack.B

    return change_stacks(adapters, context, drop)
