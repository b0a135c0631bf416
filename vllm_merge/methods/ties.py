# SPDX-License-Identifier: Apache-2.0
"""TIES: trim, elect signs, disjoint merge (Yadav et al., NeurIPS 2023, arXiv:2306.01708, §3).

In space `knots` it is KnOTS-TIES (arXiv:2410.19735, §4), in `core` Core-TIES (arXiv:2509.17786).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from vllm_merge.algebra.selection import kth_largest_of
from vllm_merge.algebra.tiles import Tile, TilePasses
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method

if TYPE_CHECKING:
    from vllm_merge.kernels.products import Rule


class TiesStatistics:
    """What TIES needs to know of the whole model.

    rule: what a tile's entries that are made on the fly were kept by before, if by anything: then nothing is trimmed.
    """

    def __init__(
        self, passes: TilePasses, *, trim: str, normalize: bool, rule: Callable[[Tile], Rule] | None = None
    ) -> None:
        self._passes = passes
        self._given = rule
        density = passes.parameters["density"]
        given = density.cpu()  # read before there is other work to wait for
        entries = passes.entries[:, None]
        self._whole_model = trim == "global" and bool((given == given[:1]).all())
        if self._whole_model:
            entries, density = entries.sum(0, keepdim=True), density[:1]
        if bool((given == 1).all()):
            thresholds = torch.zeros_like(density, dtype=torch.float32)
        else:
            # As the original keeps |x| ≥ the (d − ⌊d·density⌋)-th smallest, it keeps ⌊d·density⌋ + 1 of d entries.
            thresholds = kth_largest_of(passes, (entries * density).long() + 1)
        modules, n = passes.parameters["density"].shape
        self.threshold = thresholds.expand(modules, n)
        """Smallest magnitude that is kept, (all modules, n) float32."""
        self._counts = entries.new_zeros(modules, 2)
        self._asked = False

    @cached_property
    def majority(self) -> Tensor:
        """Sign of most sums of the whole model (of a module, if it trims by module), (all modules,) float32.

        Taken where a sum of kept values is exactly 0, which is rare: the pass is made when it is first asked for.
        """
        votes = self.threshold.new_zeros(self.threshold.shape[0], dtype=torch.float64)
        for tile in self._passes.tiles():
            if tile.values.is_meta:
                from vllm_merge.kernels import products as kernel

                votes[tile.modules] += kernel.votes(tile.products(), self._rule(tile))
            else:
                votes[tile.modules] += _trimmed(tile, self).sum(1).sign().sum((-1, -2), dtype=torch.float64)
        return (votes.sum().expand_as(votes) if self._whole_model else votes).sign().float()

    def count_conflicts(self, modules: slice, total: Tensor, magnitude: Tensor) -> None:
        """Note entries whose kept values differ in sign: there |Σ x| < Σ |x|."""
        counts = [(magnitude > 0).sum((-1, -2)), (total.abs() < magnitude).sum((-1, -2))]
        self._counts[modules] += torch.stack(counts, dim=1)

    def elected(self, tile: Tile, *, normalize: bool) -> Tensor:
        """The rule by the kernel that makes the entries on the fly."""
        from vllm_merge.kernels.products import elect

        products, rule = tile.products(), self._rule(tile)
        found = None if self._asked else elect(products, rule, mean=normalize)
        if found is None or bool(found.undecided):
            self._asked = True  # once a sum was undecided, what follows is not tried without the majority
            majority = self.majority[tile.modules]
            majority = torch.where(majority == 0, -1.0, majority)
            found = elect(products, rule, mean=normalize, majority=majority)
        self._counts[tile.modules] += found.counts
        return found.merged

    def _rule(self, tile: Tile) -> Rule:
        from vllm_merge.kernels.products import Rule

        if self._given is not None:
            return self._given(tile)
        return Rule(tile.parameters["weight"][:, :, 0, 0], least=self.threshold[tile.modules])

    @property
    def sign_conflict(self) -> Tensor:
        """Share of the kept entries whose adapters differ in sign, (all modules,)."""
        kept, conflicts = self._counts.unbind(1)
        return conflicts / kept.clamp_min(1)


def _trimmed(tile: Tile, statistics: TiesStatistics) -> Tensor:
    """The weighted entries that are kept, zero elsewhere; masks are float32, much faster than booleans on a CPU."""
    values = tile.values.float()
    keep = values.abs()
    torch.ge(keep, statistics.threshold[tile.modules][:, :, None, None], out=keep)
    return keep.mul_(values).mul_(tile.parameters["weight"])


@merge_method(
    "ties",
    spaces=("knots", "delta", "core"),
    reference="arXiv:2306.01708",
    statistics=TiesStatistics,
    entrywise=True,
    on_the_fly=True,
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

    density: share of a task's entries that is kept, over the whole model (trim: global) or in every module; a density
    that differs by module trims by module. normalize: the mean of the tasks that agree, weighted by |w_i|; otherwise
    their weighted sum.
    """
    if tile.values.is_meta:
        return statistics.elected(tile, normalize=normalize)
    kept = _trimmed(tile, statistics)
    total, magnitude = kept.sum(1), kept.abs().sum(1)
    statistics.count_conflicts(tile.modules, total, magnitude)
    return disjoint_merge(kept, total, magnitude, weight, normalize, lambda: statistics.majority[tile.modules])


def disjoint_merge(
    kept: Tensor, total: Tensor, magnitude: Tensor, weight: Tensor, normalize: bool, majority: Callable[[], Tensor]
) -> Tensor:
    """Elect the sign of each entry by its sum, and take the mean (or the sum) of the tasks that agree with it.

    kept: (modules, n, rows, cols), trimmed and weighted, used up; total, magnitude: Σ kept and Σ |kept|; weight:
    (modules, n, 1, 1). majority(): the sign, (modules,), where a sum is exactly 0 and its terms are not.
    """
    elected = total.sign()
    undecided = (total == 0) & (magnitude > 0)
    if bool(undecided.any()):
        elected = torch.where(undecided, majority()[:, None, None].to(kept.dtype), elected)
        elected = torch.where(undecided & (elected == 0), -1.0, elected)  # no majority: as the original, negative
    agreeing = kept.mul_(elected[:, None]).clamp_min_(0)
    merged = agreeing.sum(1) * elected
    if not normalize:
        return merged
    divisor = (agreeing.sign_() * weight.abs()).sum(1)
    return merged / torch.where(divisor > 0, divisor, 1.0)
