# SPDX-License-Identifier: Apache-2.0
"""TSV-M: merging along whitened task singular vectors (Gargiulo et al., CVPR 2025, arXiv:2412.00081, §4.2).

On LoRA a task keeps its own singular triples: more than its rank would be null vectors, which are arbitrary.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import Triples, isotropic, polar, triples_of_product
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("tsv_m", spaces=("core",), reference="arXiv:2412.00081", whole_modules=True)
def tsv_m(
    cores: Cores, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)], isotropize: bool = False
) -> Tensor:
    """Whitened singular directions, ΔW = λ polar([U_1 … U_n]) diag(S_1 … S_n) polar([V_1 … V_n])ᵀ. Rank ≤ Σ r_i.

    Each task keeps its r_i singular triples, or ⌊min(d_out, d_in) / n⌋ where all do not fit into ΔW. isotropize: give
    all singular values of the result their mean (as the Core Space paper does, arXiv:2509.17786).
    """
    tasks, keep = cores.scaled(weight), kept_ranks(cores)
    pieces = [triples_of_product(*tasks.task(index)).leading(keep[:, index]) for index in range(keep.shape[1])]
    every = Triples.cat(pieces)
    merged = polar(every.U) * every.S[:, None, :] @ polar(every.V).mT
    return isotropic(merged) if isotropize else merged


def kept_ranks(cores: Cores) -> Tensor:
    """How many singular triples each task keeps, (modules, n): r_i, or its equal share where Σ r_i > min(d)."""
    room = min(cores.shape)
    share = (room // (cores.ranks > 0).sum(1).clamp_min(1)).clamp_min(1)
    fits = cores.ranks.sum(1) <= room
    return torch.where(fits[:, None], cores.ranks, torch.minimum(cores.ranks, share[:, None]))
