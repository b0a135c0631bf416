# SPDX-License-Identifier: Apache-2.0
"""CtM, compress then merge: one adapter of rank r from shared bases of rank r (He et al., ICML 2026, arXiv:2606.03723)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.masks import keep_mask, mask_identity, mask_keys
from vllm_merge.algebra.tiles import Passes
from vllm_merge.algebra.tucker import shared_bases
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method
from vllm_merge.methods.ties import disjoint_merge

STOP = 1e-6  # change of the relative error at which the bases are settled, as in the authors' code


@dataclass(frozen=True, slots=True)
class Coordinates:
    """O_i = Uᵀ ΔW_i V, (modules, n, r, r) float64, of which each module has its own entries, (modules,), and zeros.

    weight, density: (modules, n, 1, 1). keys: of masks, (modules, n).
    """

    values: Tensor
    entries: Tensor
    weight: Tensor
    density: Tensor
    keys: Tensor | None


def merge_by_sum(tasks: Coordinates) -> Tensor:
    """Σ w_i O_i."""
    return (tasks.weight * tasks.values).sum(1)


def merge_by_mean(tasks: Coordinates) -> Tensor:
    """Σ w_i O_i / Σ |w_i|."""
    total = tasks.weight.abs().sum(1)
    return merge_by_sum(tasks) / torch.where(total > 0, total, 1.0)


def merge_by_ties(tasks: Coordinates) -> Tensor:
    """TIES within the module: trim, elect signs, disjoint mean."""
    magnitudes = tasks.values.abs()
    descending = magnitudes.flatten(2).sort(-1, descending=True).values
    # As TIES' original: ⌊d · density⌋ + 1 of d entries, all of them at density 1.
    last = (tasks.entries[:, None] * tasks.density[..., 0, 0]).long().clamp_max(descending.shape[-1] - 1)
    threshold = descending.gather(-1, last[..., None])[..., None]
    return _elect(tasks.values * (magnitudes >= threshold), tasks.weight)


def merge_by_dare_ties(tasks: Coordinates) -> Tensor:
    """DARE-TIES: drop coordinates at random, rescale the rest, elect signs, disjoint mean."""
    assert tasks.keys is not None
    rows, cols = (slice(0, size) for size in tasks.values.shape[2:])
    return _elect(tasks.values * keep_mask(tasks.keys, tasks.density, rows, cols) / tasks.density, tasks.weight)


def _elect(kept: Tensor, weight: Tensor) -> Tensor:
    kept = kept * weight
    total, magnitude = kept.sum(1), kept.abs().sum(1)
    majority = total.sign().sum((-1, -2)).sign()
    return disjoint_merge(kept, total, magnitude, weight, True, lambda: majority)


RULES: dict[str, Callable[[Coordinates], Tensor]] = {
    "ties": merge_by_ties,
    "dare_ties": merge_by_dare_ties,
    "mean": merge_by_mean,
    "sum": merge_by_sum,
}


def keys_of_masks(passes: Passes, *, rule: str, **others: object) -> Tensor | None:
    """Keys of DARE's masks, (all modules, n) int64, where the rule draws any."""
    if rule != "dare_ties":
        return None
    identities = [mask_identity(adapter) for adapter in passes.adapters]
    return mask_keys(passes.seed, identities, passes.modules).to(passes.entries.device)


@merge_method(
    "ctm", spaces=("core",), reference="arXiv:2606.03723", statistics=keys_of_masks, whole_modules=True, iterative=True
)
def ctm(
    cores: Cores,
    keys: Tensor | None,
    *,
    weight: Annotated[Tensor, PerAdapter(1.0)],
    density: Annotated[Tensor, PerAdapter(0.25), Gt(0), Le(1)],
    rule: Literal["ties", "dare_ties", "mean", "sum"] = "ties",
    target_rank: Annotated[int, Ge(1)] | Literal["largest"] = "largest",
    beta: Annotated[float, Ge(0), Le(1)] = 0.25,
) -> Tensor:
    """Shared bases U, V of rank r first, then ΔW = λ U rule(Uᵀ ΔW_1 V, …, Uᵀ ΔW_n V) Vᵀ: one adapter of rank r.

    target_rank: r; the largest of the adapters' ranks unless it is given. beta: how much of the differences in norm the
    bases see, 0 nothing (all tasks count alike) to 1 all. density: share of a task's r² coordinates that `ties` keeps, the
    largest, or `dare_ties`, at random.
    """
    largest = cores.ranks.amax(1)
    ranks = largest if target_rank == "largest" else torch.full_like(largest, target_rank)
    norms = cores.norms() * weight.flatten(1).abs()
    present = norms > 0
    mean = norms.sum(1, keepdim=True) / present.sum(1, keepdim=True).clamp_min(1)
    seen = torch.where(present, (beta * norms + (1 - beta) * mean) / norms, 0.0)
    balanced = cores.scaled(weight.flatten(1) * seen)
    u, v = shared_bases(balanced.left, cores.right, cores.slots, ranks, STOP)
    left, right = u.mT @ cores.left, cores.right @ v
    values = torch.stack([left[:, :, slot] @ right[:, slot] for slot in cores.slots], dim=1)
    coordinates = Coordinates(
        values,
        ranks.clamp_max(u.shape[1]) * ranks.clamp_max(v.shape[1]),
        weight,
        density,
        None if keys is None else keys[cores.modules],
    )
    return u @ RULES[rule](coordinates) @ v.mT
