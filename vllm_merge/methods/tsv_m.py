# SPDX-License-Identifier: Apache-2.0
"""TSV-M: merging along whitened task singular vectors (Gargiulo et al., CVPR 2025, arXiv:2412.00081, §4.2).

On LoRA a task keeps its own singular triples: more than its rank would be null vectors, which are arbitrary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import isotropic, leading_of_each, polar_of_each, ranks_of_each, triples_of_each
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("tsv_m", spaces=("core",), reference="arXiv:2412.00081", whole_modules=True)
def tsv_m(
    cores: Cores, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)], isotropize: bool = False
) -> Tensor:
    """Whitened singular directions, ΔW = λ polar([U_1 … U_n]) diag(S_1 … S_n) polar([V_1 … V_n])ᵀ. Rank ≤ Σ r_i.

    Each task keeps its rank(ΔW_i) ≤ r_i singular triples, or ⌊min(d_out, d_in) / n⌋ where all do not fit into ΔW. isotropize: give
    all singular values of the result their mean (as the Core Space paper does, arXiv:2509.17786).
    """
    tasks = cores.scaled(weight)
    own = triples_of_each([tasks.task(index) for index in range(len(tasks.slots))])
    every = leading_of_each(own, kept_ranks(ranks_of_each(own), cores.room))
    u, v = polar_of_each(every.U, every.V)
    merged = u * every.S[:, None, :] @ v.mT
    return isotropic(merged) if isotropize else merged


def kept_ranks(ranks: Tensor, room: int) -> Tensor:
    """How many singular triples each task keeps, of its rank: all, or its equal share where they exceed the room.

    ranks and the result: (modules, n), 0 where a task has nothing; room: at most as many directions as ΔW has.
    """
    share = (room // (ranks > 0).sum(1).clamp_min(1)).clamp_min(1)
    fits = ranks.sum(1) <= room
    return torch.where(fits[:, None], ranks, torch.minimum(ranks, share[:, None]))
