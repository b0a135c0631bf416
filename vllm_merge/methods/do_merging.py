# SPDX-License-Identifier: Apache-2.0
"""DO-Merging: decouple magnitude and direction, orthogonalise (Zheng et al., arXiv:2505.15875).

After the orthogonalisation of the factors (`do_orthogonalize`), column by column of ΔW_i, one column per input feature:
    α_i[j] = ‖ΔW_i[:, j]‖,   W̄_i[:, j] = ΔW_i[:, j] / α_i[j],   ΔW = λ · merge(α) ⊙ merge(W̄).
α_i[j]² = a_jᵀ (BᵀB) a_j needs no dense matrix, and scaling columns keeps the column space: in `knots` the result has
rank ≤ Σ r_i exactly, because U has orthonormal columns and those of Z_i are the input features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.algebra.coordinates import owners
from vllm_merge.algebra.passes import MappedPasses
from vllm_merge.algebra.selection import kth_largest
from vllm_merge.algebra.tiles import Passes, Tile
from vllm_merge.methods.do_orthogonalize import do_orthogonalize
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.preconditions import Context
from vllm_merge.methods.registry import Lengths, merge_method
from vllm_merge.methods.resolve import ResolvedParameters
from vllm_merge.methods.ties import TiesStatistics, ties

Rule = Literal["mean", "sum", "ties"]


def magnitudes(tile: Tile) -> Tensor:
    """α, (modules, n, 1, cols) float32; 0 where a column is rounding beside the terms it is made of."""
    left, right = (part.double() for part in tile.apart())
    gram = left.mT @ left
    squared = ((gram @ right) * right).sum(2)
    terms = (gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None] * right.abs()).sum(2)
    return torch.where(squared > (TOLERANCE * terms) ** 2, squared, 0.0).sqrt()[:, :, None].float()


def directions(tile: Tile) -> Tile:
    """W̄, with zeros for columns without a direction."""
    alpha = magnitudes(tile)
    return replace(tile, values=torch.where(alpha > 0, tile.values / alpha, 0.0))


class DoStatistics:
    """What the parts that are merged by TIES need to know of the whole model."""

    def __init__(
        self, passes: Passes, *, magnitude_rule: Rule, direction_rule: Rule, trim: str, **others: object
    ) -> None:
        self._passes = passes
        self.of_directions: TiesStatistics | None = None
        if direction_rule == "ties":
            self.of_directions = TiesStatistics(MappedPasses(passes, directions, {}), trim=trim, normalize=True)
        self.threshold: Tensor | None = None
        """Smallest magnitude that is kept, (all modules, n) float32."""
        if magnitude_rule == "ties":
            density = passes.parameters["density"]
            columns = torch.zeros(len(density), 1, dtype=torch.int64, device=density.device)
            for tile in passes.tiles():
                columns[tile.modules] = tile.right.shape[2]
            if trim == "global" and bool((density == density[:1]).all()):
                counts = (columns.sum(0, keepdim=True) * density[:1]).long() + 1
            else:
                counts = (columns * density).long() + 1
            self.threshold = kth_largest(self._magnitudes, counts).expand_as(density)

    def _magnitudes(self) -> Iterator[tuple[Tensor, slice]]:
        for tile in self._passes.tiles():
            if tile.rows.start == 0:  # a column's magnitude is the same in all strips of rows
                yield magnitudes(tile), tile.modules

    @property
    def sign_conflict(self) -> Tensor | None:
        """Share of the kept direction entries whose adapters differ in sign, (all modules,); None without TIES."""
        return None if self.of_directions is None else self.of_directions.sign_conflict


def lengths(*, magnitude_rule: Rule, direction_rule: Rule, **others: object) -> Lengths | None:
    """The lengths that the columns of every ΔW_i get (MethodSpec.columns): merge(α) times their share; None with TIES."""
    if "ties" in (magnitude_rule, direction_rule):
        return None

    def given(alpha: Tensor, *, weight: Tensor, **others: object) -> Tensor:
        shares = weight if direction_rule == "sum" else weight / _divisor(weight)[:, None]
        return _merged(alpha, weight.abs(), magnitude_rule)[:, None] * shares

    return given


def orthogonalized(
    adapters: Sequence[Adapter], context: Context, space: str, parameters: ResolvedParameters
) -> Sequence[Adapter]:
    """The adapters after the orthogonalisation that the parameters ask for."""
    given = parameters.per_recipe
    if given["orthogonalize"] == "none":
        return adapters
    changed = do_orthogonalize(
        adapters,
        context,
        optimizer=given["orthogonalize"],
        **{name: given[name] for name in ("steps", "gamma", "norm_power", "lr_scale")},
    )
    return [Adapter(adapter.name, factors) for adapter, factors in zip(adapters, changed, strict=True)]


@merge_method(
    "do_merging",
    spaces=("knots", "delta"),
    reference="arXiv:2505.15875",
    statistics=DoStatistics,
    columns=lengths,
    prepare=orthogonalized,
    iterative=True,
)
def do_merging(
    tile: Tile,
    statistics: DoStatistics,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.2), Gt(0), Le(1)],
    magnitude_rule: Rule = "mean",
    direction_rule: Rule = "mean",
    trim: Literal["global", "module"] = "global",
    orthogonalize: Literal["descent", "adam", "none"] = "descent",
    steps: Annotated[int, Ge(1)] = 100,
    gamma: Annotated[float, Ge(0)] = 1.0,
    norm_power: Literal[1, 2] = 2,
    lr_scale: Annotated[float, Gt(0)] = 0.01,
) -> Tensor:
    """Orthogonalise the factors, then merge the columns' magnitudes and their directions apart, and multiply the two.

    magnitude_rule, direction_rule: mean, sum, or ties, which trims to `density` (over the whole model, or by module) and
    averages what agrees. Means of both are λ = 1/n² of the sums. orthogonalize, steps, gamma, norm_power, lr_scale: see
    the precondition do_orthogonalize. Directions are weighted by w_i, magnitudes by |w_i|.
    """
    alpha = magnitudes(tile)
    given = lengths(magnitude_rule=magnitude_rule, direction_rule=direction_rule)
    if given is not None:  # then no entry of a task alone is needed
        there = alpha[:, :, 0] > 0
        owner = owners(tile.slots).to(alpha.device, non_blocking=True)
        unit = tile.right[:, :, tile.cols] / torch.where(there, alpha[:, :, 0], 1.0)[:, owner]
        wanted = torch.where(there, given(alpha[:, :, 0], weight=weight[..., 0]), 0.0)
        merged: Tensor = tile.left[:, tile.rows] @ (unit * wanted[:, owner])
        return merged
    if magnitude_rule == "ties":
        assert statistics.threshold is not None
        kept = alpha >= statistics.threshold[tile.modules][:, :, None, None]
        magnitude = _mean(alpha * kept, weight.abs(), (alpha > 0) & kept)
    else:
        magnitude = _merged(alpha, weight.abs(), magnitude_rule)
    if direction_rule == "ties":
        assert statistics.of_directions is not None
        return magnitude * ties(directions(tile), statistics.of_directions, weight=weight, density=density, trim=trim)
    return magnitude * _merged(torch.where(alpha > 0, tile.values / alpha, 0.0), weight, direction_rule)


def _merged(values: Tensor, weight: Tensor, rule: Rule) -> Tensor:
    return (weight * values).sum(1) if rule == "sum" else _mean(values, weight, torch.ones_like(weight))


def _mean(values: Tensor, weight: Tensor, counted: Tensor) -> Tensor:
    """Σ w_i x_i / Σ |w_i| over what is counted."""
    return (weight * values).sum(1) / _divisor(weight * counted)


def _divisor(weight: Tensor) -> Tensor:
    """Σ |w_i|, or 1 where that is 0."""
    divisor = weight.abs().sum(1)
    return torch.where(divisor > 0, divisor, 1.0)
