# SPDX-License-Identifier: Apache-2.0
"""Iso-C: isotropic merging in the common subspace (Marczak et al., ICML 2025, arXiv:2502.04959, §4.1).

On the support of the sum only: the dense original also puts the mean singular value on null vectors of low-rank changes,
which are arbitrary, and averages over their zeros. Where the sum has full rank both are the same.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.spectral import isotropic
from vllm_merge.methods.markers import PerAdapter
from vllm_merge.methods.registry import merge_method


@merge_method("iso_c", spaces=("core",), reference="arXiv:2502.04959", whole_modules=True)
def iso_c(cores: Cores, statistics: None, *, weight: Annotated[Tensor, PerAdapter(1.0)]) -> Tensor:
    """The sum with a flat spectrum: Σ w_i ΔW_i = U S Vᵀ, ΔW = λ mean(S) U Vᵀ. Rank of the sum, ≤ Σ r_i."""
    return isotropic(cores.scaled(weight).total())
