# SPDX-License-Identifier: Apache-2.0
"""How the adapters of a plan lie to each other: norms, cosines, and the spectrum of any weighted sum of them.

All of it follows from AAᵀ and BᵀB of the stacked factors, K × K numbers a module; no ΔW is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.stacking import ModuleGroup, group_modules, stack_group
from vllm_merge.algebra.coordinates import Grams
from vllm_merge.algebra.symmetric import descending_eigh

BATCH = 8  # modules at once


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some modules of a shape, and the Gram matrices of their stacks, (modules, K, K) float64."""

    group: ModuleGroup
    gram_a: Tensor
    gram_b: Tensor


class Overlap:
    """The Gram matrices of some adapters, at every module that any of them has."""

    def __init__(self, adapters: Sequence[Adapter], progress: Callable[[int, int], None] | None = None) -> None:
        """Raises UserInputError where adapters disagree on the shape of a module. progress(modules done, modules)."""
        self.names = [adapter.name for adapter in adapters]
        self._pieces: list[_Piece] = []
        groups = group_modules(adapters)
        total, done = sum(len(group.modules) for group in groups), 0
        for group in groups:
            for batch in group.batches(BATCH):
                if progress is not None:
                    progress(done, total)
                grams = Grams.of(stack_group(batch, adapters, torch.device("cpu")))
                self._pieces.append(_Piece(batch, grams.A, grams.B))
                done += len(batch.modules)

    def products(self) -> Tensor:
        """⟨ΔW_i, ΔW_j⟩ over the whole model, (n, n) float64; its diagonal are the squared norms."""
        n = len(self.names)
        found = torch.zeros(n, n, dtype=torch.float64)
        for piece in self._pieces:
            both = (piece.gram_a * piece.gram_b).sum(0)
            for i, one in enumerate(piece.group.slots):
                for j, two in enumerate(piece.group.slots):
                    found[i, j] += both[one, two].sum()
        return found

    def spectra(self, coefficients: Mapping[str, Mapping[str, float]]) -> dict[str, Tensor]:
        """Squared singular values of Σ_i c_i ΔW_i at each module, (K,) float64, largest first.

        coefficients: {adapter: {module: c}}; an adapter or module that is not in it counts with 0.
        """
        found: dict[str, Tensor] = {}
        for piece in self._pieces:
            scale = torch.zeros_like(piece.gram_b[:, 0])
            for name, slot in zip(self.names, piece.group.slots, strict=True):
                mine = coefficients.get(name, {})
                at = torch.tensor([mine.get(module, 0.0) for module in piece.group.modules], dtype=torch.float64)
                scale[:, slot] = at[:, None]
            values, vectors = descending_eigh(scale[:, :, None] * piece.gram_b * scale[:, None, :])
            half = vectors * values.sqrt()[:, None, :]
            squares, _ = descending_eigh(half.mT @ piece.gram_a @ half)
            found.update(zip(piece.group.modules, squares, strict=True))
        return found
