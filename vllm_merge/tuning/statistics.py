# SPDX-License-Identifier: Apache-2.0
"""Second moments of a module's inputs, and the A' that make B A' do to them what each adapter does to its own.

Both rules minimise Σ_k ‖B A' X_k − ΔW_k X_k‖², X_k (d_in, tokens) the inputs of task k and ΔW_k = B_k A_k, with B = [B_1 … B_n]
kept. With A = [A_1; …; A_n] (K, d_in), G = Σ X_k X_kᵀ and C = Σ E_k A_k X_k X_kᵀ (E_k puts the rows of task k where A has them):
    SSR (arXiv:2606.10617):      A' = R A,  R = (C Aᵀ / N) (A G Aᵀ / N + ridge · I)⁻¹, with K × K statistics alone
    RegMean (arXiv:2212.09849):  A' = C̃ G̃⁻¹, with the entries of G̃ and C̃ that X X ᵀ has off its diagonal times 0.95
N counts tokens. Inputs whose target is the base model (k is None) enter G alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

RIDGE = 1e-4  # of SSR, absolute, as published
OFF_DIAGONAL = 0.95  # of RegMean, as published
TINY = 1e-9  # of RegMean's mean diagonal: for inputs that never vary


@dataclass(frozen=True, slots=True)
class Fit:
    """How well an A' does: ‖B A' X − ΔW_k X‖² over all tasks, and ‖ΔW_k X‖²; both a token's."""

    error: float
    size: float


class Moments(ABC):
    """What one module's inputs leave behind. moments: sums over all tokens, by name."""

    @classmethod
    @abstractmethod
    def empty(cls, a: Tensor, b: Tensor, owner: Tensor) -> Self:
        """Of no inputs. a: (K, d_in), b: (d_out, K), owner: (K,) int64, the stacked factors and whose each is."""

    @abstractmethod
    def add(self, inputs: Tensor, owner: int | None) -> None:
        """inputs: (tokens, d_in) while adapter `owner` was active, or the base model alone."""

    @abstractmethod
    def solved(self) -> Tensor:
        """A' (K, d_in) float64."""

    @abstractmethod
    def fit(self, a: Tensor) -> Fit:
        """Of an A' (K, d_in) float64; A itself is the plain sum."""

    def __init__(self, a: Tensor, b: Tensor, owner: Tensor, moments: Mapping[str, Tensor]) -> None:
        self._a, self._b, self._owner = a.double(), b.double(), owner.to(a.device)
        self.moments = {name: value.to(a.device) for name, value in moments.items()}

    def _mine(self, owner: int | None) -> Tensor:
        return (self._owner == (-1 if owner is None else owner)).double()

    @property
    def _tokens(self) -> float:
        return max(float(self.moments["tokens"]), 1.0)

    def _fitted(self, quadratic: Tensor, cross: Tensor) -> Fit:
        """quadratic: A' G A'ᵀ, cross: C A'ᵀ, both (K, K)."""
        gram, size = self._b.mT @ self._b, self.moments["size"]
        error = (gram * (quadratic - cross - cross.mT)).sum() + (gram * size).sum()
        return Fit(float(error) / self._tokens, float((gram * size).sum()) / self._tokens)

    @classmethod
    def combined(cls, parts: Sequence[Moments], weights: Sequence[float]) -> Moments:
        """The weighted sum of the means over the tokens of several sets."""
        first = parts[0]
        scaled = [weight / part._tokens for part, weight in zip(parts, weights, strict=True)]
        moments = {
            name: torch.stack([part.moments[name] * by for part, by in zip(parts, scaled, strict=True)]).sum(0)
            for name in first.moments
        }
        moments["tokens"] = torch.ones((), dtype=torch.float64)
        joined = copy(first)
        joined.moments = moments
        return joined


class Ssr(Moments):
    """gram: A G Aᵀ, cross: C Aᵀ, size: Σ E_k A_k X_k X_kᵀ A_kᵀ E_kᵀ, each (K, K) float64."""

    ridge = RIDGE

    @classmethod
    def empty(cls, a: Tensor, b: Tensor, owner: Tensor, ridge: float = RIDGE) -> Self:
        zero = torch.zeros(len(a), len(a), dtype=torch.float64)
        names = ("gram", "cross", "size")
        made = cls(a, b, owner, {**dict.fromkeys(names, zero), "tokens": torch.zeros((), dtype=torch.float64)})
        made.ridge = ridge
        return made

    def add(self, inputs: Tensor, owner: int | None) -> None:
        z, mine = inputs.double() @ self._a.mT, self._mine(owner)
        gram = z.mT @ z
        more = {"gram": gram, "cross": mine[:, None] * gram, "size": mine[:, None] * gram * mine}
        self.moments = {name: self.moments[name] + more.get(name, len(inputs)) for name in self.moments}

    def _mixing(self) -> Tensor:
        n = self._tokens
        ridge = self.ridge * torch.eye(len(self._a), dtype=torch.float64, device=self._a.device)
        mixing: Tensor = torch.linalg.solve(self.moments["gram"] / n + ridge, (self.moments["cross"] / n).mT).mT
        return mixing

    def solved(self) -> Tensor:
        return self._mixing() @ self._a

    def fit(self, a: Tensor) -> Fit:
        mixing = a @ torch.linalg.pinv(self._a)
        return self._fitted(mixing @ self.moments["gram"] @ mixing.mT, self.moments["cross"] @ mixing.mT)


class RegMean(Moments):
    """gram: G (d_in, d_in), cross: C (K, d_in), spread: the diagonal of each task's X X ᵀ, (n, d_in); size as in SSR."""

    @classmethod
    def empty(cls, a: Tensor, b: Tensor, owner: Tensor) -> Self:
        k, d = a.shape
        tasks = int(owner.max()) + 1
        shapes = {"gram": (d, d), "cross": (k, d), "spread": (tasks, d), "size": (k, k), "tokens": ()}
        return cls(a, b, owner, {name: torch.zeros(s, dtype=torch.float64) for name, s in shapes.items()})

    def add(self, inputs: Tensor, owner: int | None) -> None:
        x, mine = inputs.double(), self._mine(owner)
        z = (x @ self._a.mT) * mine
        spread = torch.zeros_like(self.moments["spread"])
        if owner is not None and owner < len(spread):
            spread[owner] = x.square().sum(0)
        more = {"gram": x.mT @ x, "cross": z.mT @ x, "spread": spread, "size": z.mT @ z}
        self.moments = {name: self.moments[name] + more.get(name, len(inputs)) for name in self.moments}

    def solved(self) -> Tensor:
        n = self._tokens
        gram, own = self.moments["gram"] / n, self.moments["spread"][self._owner] / n
        diagonal = gram.diagonal()
        shrunk = OFF_DIAGONAL * gram + torch.diag((1 - OFF_DIAGONAL) * diagonal + TINY * diagonal.mean())
        cross = OFF_DIAGONAL * self.moments["cross"] / n + (1 - OFF_DIAGONAL) * self._a * own
        solved: Tensor = torch.linalg.solve(shrunk, cross.mT).mT
        return solved

    def fit(self, a: Tensor) -> Fit:
        return self._fitted(a @ self.moments["gram"] @ a.mT, self.moments["cross"] @ a.mT)
