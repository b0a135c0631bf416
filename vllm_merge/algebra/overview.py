# SPDX-License-Identifier: Apache-2.0
"""How the adapters of a merge lie to each other and to the result, for its report.

Cosine: ⟨ΔW_i, ΔW_j⟩ / (‖ΔW_i‖ ‖ΔW_j‖).
Overlap of column spaces: ‖U_iᵀU_j‖²_F / min(r_i, r_j), U_i an orthonormal basis of the columns of B_i on its numerical
support and r_i its rank; of row spaces, the same of A_iᵀ (Hu et al., LoRA, arXiv:2106.09685, §7.2). 1 where one space
lies within the other, 0 where they are orthogonal, about max(r_i, r_j) / d for random ones.
Effective rank: exp(−Σ p log p) with p = σ / Σσ, the singular values of the result (Roy and Vetterli, EUSIPCO 2007).
Sign conflict: share of the entries, in the space of the merge, at which two weighted tasks differ in sign.

All but the last follow from K × K products; nothing is read from the device before the end.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.stacking import ModuleGroup, Stack
from vllm_merge.algebra.bases import orthonormal_basis
from vllm_merge.algebra.coordinates import Grams, owner_matrix
from vllm_merge.algebra.tiles import Tile


@dataclass(frozen=True, slots=True)
class Findings:
    """Of every module, or of the whole model (modules = 1), float64 on the CPU; nan where there is nothing to compare.

    cosines, column_overlaps, row_overlaps: (modules, n, n); result_cosines: (modules, n); effective_rank,
    sign_conflict: (modules,), the latter nan for methods that see no entries.
    """

    cosines: Tensor
    result_cosines: Tensor
    column_overlaps: Tensor
    row_overlaps: Tensor
    effective_rank: Tensor
    sign_conflict: Tensor

    def listed(self) -> dict[str, list[Any]]:
        """Everything by name, a plain value for each module, to five digits after the point; None for nan.

        Of matrices, the values of the pairs i < j in the order (0, 1), (0, 2), …, (1, 2), …
        """
        upper = torch.triu_indices(self.cosines.shape[-1], self.cosines.shape[-1], 1)
        found: dict[str, list[Any]] = {}
        for field in fields(self):
            values: Tensor = getattr(self, field.name)
            of_pairs = values[:, upper[0], upper[1]] if values.ndim == 3 else values
            found[field.name] = _plain(of_pairs.round(decimals=5).tolist())
        return found


class Overview:
    """Gathers what the report says, batch by batch, on the device."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks
        self._signs: list[Tensor] = []  # of the batch that is merged now: (modules, 2), entries that differ, and all
        self._rows: list[Tensor] = []

    def count_signs(self, tile: Tile, first: int, modules: int) -> None:
        """Count the entries of a tile at which tasks differ in sign. first, modules: of the batch it is a part of."""
        if not self._signs:
            self._signs.append(tile.left.new_zeros(modules, 2, dtype=torch.float64))
        self._signs[0][tile.modules.start - first : tile.modules.stop - first] += _signs(tile)

    def add(self, stack: Stack, grams: Grams, left: Tensor, right: Tensor) -> None:
        """The batch, or its next modules, whose result is left (modules, d_out, k) @ rightᵀ (modules, d_in, k), in factors √σ u and √σ v."""
        modules, owner = len(stack.group.modules), owner_matrix(stack.group.slots).to(grams.A)
        products = owner.mT @ (grams.A * grams.B) @ owner
        inner = (stack.B.mT @ left.float()).double() * (stack.A @ right.float()).double()
        with_result = inner.sum(-1) @ owner
        sigma = right.double().square().sum(1)
        share = sigma / sigma.sum(-1, keepdim=True)
        entropy = -torch.special.xlogy(share, share).sum(-1)
        columns, rows = _overlaps(torch.stack([grams.B, grams.A]), stack.group, owner)
        signs = entropy.new_full((modules, 2), torch.nan)
        if self._signs:
            signs, rest = self._signs[0][:modules], self._signs[0][modules:]
            self._signs = [rest] if len(rest) else []
        found = [products, with_result, sigma.square().sum(-1), entropy.exp(), columns, rows, signs]
        self._rows.append(torch.cat([part.reshape(modules, -1) for part in found], dim=1))

    def read(self) -> tuple[Findings, Findings]:
        """By module, in the order of the batches, and of the whole model; the one time the device is waited for.

        Of the whole model: cosines of all modules as one vector, means over the modules of all else.
        """
        n = self._tasks
        table = torch.cat(self._rows).cpu()
        widths = [n * n, n, 1, 1, n * n, n * n, 2]
        products, with_result, square, effective, columns, rows, signs = torch.split(table, widths, dim=1)
        products, columns, rows = (part.reshape(-1, n, n) for part in (products, columns, rows))

        def findings(products: Tensor, with_result: Tensor, square: Tensor, *others: Tensor) -> Findings:
            norms = products.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
            cosines = products / (norms[:, :, None] * norms[:, None, :])
            return Findings(cosines.clamp(-1, 1), (with_result / (norms * square.sqrt())).clamp(-1, 1), *others)

        conflict = signs[:, 0] / signs[:, 1]
        by_module = findings(products, with_result, square, columns, rows, effective[:, 0], conflict)
        sums = [part.sum(0, keepdim=True) for part in (products, with_result, square)]
        means = [part.nanmean(0, keepdim=True) for part in (columns, rows, effective[:, 0])]
        counts = signs.nansum(0, keepdim=True)
        return by_module, findings(*sums, *means, counts[:, 0] / counts[:, 1])


def _signs(tile: Tile) -> Tensor:
    """At how many entries tasks differ in sign, and at how many one is not zero, (modules, 2)."""
    weight, values = tile.parameters.get("weight"), tile.values
    if values.is_meta:
        from vllm_merge.kernels import products

        given = tile.left.new_ones(values.shape[:2]) if weight is None else weight[:, :, 0, 0]
        return products.signs(tile.products(), given)
    if weight is not None and bool((weight <= 0).any()):
        values = values * weight.sign().to(values.dtype)
    positive, negative = values.amax(1) > 0, values.amin(1) < 0
    return torch.stack([(positive & negative).sum((-1, -2)), (positive | negative).sum((-1, -2))], dim=1)


def _overlaps(grams: Tensor, group: ModuleGroup, owner: Tensor) -> Tensor:
    """‖U_iᵀU_j‖²_F / min(r_i, r_j) of two kinds of stacks at once, from their Gram matrices (2, modules, K, K)."""
    n, width = len(group.slots), max(slot.stop - slot.start for slot in group.slots)
    kinds, modules = grams.shape[:2]
    blocks = grams.new_zeros(kinds, modules, n, width, width)
    for task, slot in enumerate(group.slots):
        size = slot.stop - slot.start
        blocks[:, :, task, :size, :size] = grams[:, :, slot, slot]
    basis = orthonormal_basis(blocks.flatten(0, 2), width)
    transforms, ranks = basis.T.reshape(kinds, modules, n, width, -1), basis.rank.reshape(kinds, modules, n)
    inverse = torch.zeros_like(grams)  # of each task's own Gram matrix, on its support
    for task, slot in enumerate(group.slots):
        own = transforms[:, :, task, : slot.stop - slot.start]
        inverse[:, :, slot, slot] = own @ own.mT
    projected = inverse @ grams
    squares = owner.mT @ (projected * projected.mT) @ owner
    smaller = torch.minimum(ranks[..., :, None], ranks[..., None, :])
    return torch.where(smaller > 0, (squares / smaller).clamp(0, 1), torch.nan)


def _plain(value: Any) -> Any:
    """Lists of numbers with None for nan."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if value != value else value
