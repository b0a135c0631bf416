# SPDX-License-Identifier: Apache-2.0
"""Merges as branches of a running model: every adapter stays live, and no ΔW is ever made whole.

The branches of a composition take weights (modules, n) that may have gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.stacking import group_modules, stack_group
from vllm_merge.algebra.coordinates import Coordinates, Grams, coordinates
from vllm_merge.algebra.selection import kth_largest
from vllm_merge.tuning.model import Branch


class Composition(Protocol):
    """How weights become branches."""

    modules: tuple[str, ...]

    def branches(self, table: Tensor) -> Mapping[str, Branch]:
        """The branch of every module, for weights (modules, n) in the order of `modules`."""
        ...


def factor_branch(pair: LoraFactors, device: torch.device) -> Branch:
    """ΔW x of one LoRA pair."""
    folded = pair.folded()
    a, b = folded.A.to(device).mT, folded.B.to(device).mT

    def branch(x: Tensor) -> Tensor:
        inner = into(x, a)
        return inner @ b.to(inner.dtype)

    return branch


def into(x: Tensor, a: Tensor) -> Tensor:
    """x A for A (d_in, r): inputs (…, d_in), or the tokens (…) of an embedding, which are rows of A."""
    return x @ a.to(x.dtype) if x.is_floating_point() else embedding(x, a)


class Sum:
    """Σ λ_i ΔW_i x = B diag(λ) A x with the adapters' factors side by side: A (K, d_in), B (d_out, K), K = Σ r_i."""

    def __init__(self, adapters: Sequence[Adapter], modules: Sequence[str], device: torch.device) -> None:
        self.modules = tuple(modules)
        self._terms = {module: Terms.of(adapters, module, device) for module in modules}

    def branches(self, table: Tensor) -> Mapping[str, Branch]:
        return {
            module: self._branch(terms, table[row][terms.owner.to(table.device)].to(terms.A.device))
            for row, (module, terms) in enumerate(self._terms.items())
        }

    def terms(self, module: str) -> Terms:
        """The stacked factors of one module."""
        return self._terms[module]

    @staticmethod
    def _branch(terms: Terms, weight: Tensor) -> Branch:
        def branch(x: Tensor) -> Tensor:
            inner = into(x, terms.A.mT)
            return (inner * weight.to(inner.dtype)) @ terms.B.mT.to(inner.dtype)

        return branch


@dataclass(frozen=True, slots=True)
class Terms:
    """The rank-one terms of all adapters at a module. A: (K, d_in), B: (d_out, K) with the scaling, owner: (K,) int64."""

    A: Tensor
    B: Tensor
    owner: Tensor

    @classmethod
    def of(cls, adapters: Sequence[Adapter], module: str, device: torch.device) -> Terms:
        """Of those adapters that have the module, in order; float32, float64 where the factors are."""
        here = [(index, adapter.factors[module]) for index, adapter in enumerate(adapters) if module in adapter.factors]
        wide = any(pair.A.dtype == torch.float64 for _, pair in here)
        dtype = torch.float64 if wide else torch.float32
        a = torch.cat([pair.A.to(device, dtype) for _, pair in here])
        b = torch.cat([pair.B.to(device, dtype) * pair.scaling for _, pair in here], dim=1)
        owner = torch.cat([torch.full((pair.rank,), index) for index, pair in here])
        return cls(a, b, owner)


class Ties:
    """TIES before the weights' sum, in KnOTS or core coordinates, as the merge method `ties` without `normalize` has it.

    ΔW = L (Σ_i λ_i T_i ⊙ agree_i) R with T_i the trimmed entries of task i; agree_i says where the sign of λ_i T_i is the
    elected one. Which entries agree is looked up again for every λ and has no gradient; λ has it through the sum.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        modules: Sequence[str],
        device: torch.device,
        *,
        space: Literal["knots", "core"],
        density: Tensor,
        trim: str,
        scale: Tensor,
    ) -> None:
        """density: (modules, n); scale: λ of the recipe, (modules,), which multiplies the result."""
        self.modules = tuple(modules)
        self._scale = scale.to(device)
        self._trimmed: dict[str, Tensor] = {}
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}
        row = {module: index for index, module in enumerate(modules)}
        found: list[tuple[tuple[str, ...], Coordinates]] = []
        for group in group_modules(adapters):
            stack = stack_group(group, adapters, device)
            space_of = coordinates(space, stack, Grams.of(stack), singular=True)
            found.append((group.modules, space_of))
            self._lift(group.modules, stack.A, stack.B, space_of)
        order = [module for names, _ in found for module in names]
        entries = torch.cat([space_of.entries for _, space_of in found]).to(device)[:, None]
        share = density[[row[module] for module in order]].to(device)
        thresholds = _thresholds(
            found, share, entries, whole_model=trim == "global" and bool((share == share[:1]).all())
        )
        position = 0
        for names, space_of in found:
            values = _entries(space_of)
            keep = values.abs() >= thresholds[position : position + len(names)][:, :, None, None]
            self._trimmed.update(zip(names, (values * keep).unbind(), strict=True))
            position += len(names)

    def _lift(self, names: Sequence[str], a: Tensor, b: Tensor, space_of: Coordinates) -> None:
        left = b.double() @ space_of.left_transform if space_of.left_transform is not None else None
        right = a.mT.double() @ space_of.right_transform if space_of.right_transform is not None else None
        for index, name in enumerate(names):
            assert left is not None, "knots and core have a basis of outputs"
            self._sides[name] = (left[index].float(), torch.empty(0) if right is None else right[index].float())

    def branches(self, table: Tensor) -> Mapping[str, Branch]:
        return {module: self._branch(module, table[row], self._scale[row]) for row, module in enumerate(self.modules)}

    def _branch(self, module: str, weights: Tensor, scale: Tensor) -> Branch:
        trimmed, (left, right) = self._trimmed[module], self._sides[module]
        weighted = trimmed * weights.to(trimmed.device)[:, None, None]
        with torch.no_grad():
            agree = weighted.sign() == weighted.sum(0).sign()
        middle = (weighted * agree).sum(0) * scale.to(weighted.dtype)

        def branch(x: Tensor) -> Tensor:
            inner = into(into(x, right), middle.mT) if right.numel() else into(x, middle.mT)
            return inner @ left.mT.to(inner.dtype)

        return branch


def _entries(space_of: Coordinates) -> Tensor:
    """(modules, n, rows, columns) float32."""
    modules, _, rows, cols = space_of.shape
    return space_of.values(slice(0, modules), slice(0, rows), slice(0, cols)).float()


def _thresholds(
    found: Sequence[tuple[tuple[str, ...], Coordinates]], density: Tensor, entries: Tensor, *, whole_model: bool
) -> Tensor:
    """The smallest magnitude that TIES keeps, (modules, n) float32, as its own statistics have it."""
    if bool((density == 1).all()):
        return torch.zeros_like(density, dtype=torch.float32)
    share, count = (density[:1], entries.sum(0, keepdim=True)) if whole_model else (density, entries)

    def tiles() -> list[tuple[Tensor, slice]]:
        start, parts = 0, []
        for names, space_of in found:
            parts.append((_entries(space_of), slice(start, start + len(names))))
            start += len(names)
        return parts

    return kth_largest(tiles, (count * share).long() + 1).expand(density.shape)
