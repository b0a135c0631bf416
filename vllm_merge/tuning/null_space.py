# SPDX-License-Identifier: Apache-2.0
"""NSC: the share of a module's inputs that the task's own adapter does not see (Null-Space Compression, arXiv:2603.26317).

    ω = √(1 − (A z)ᵀ (A Aᵀ)⁻¹ (A z) / ‖z‖²),
averaged over the prompt's tokens and the modules of the last quarter of the layers. z is the input of a module in the merged
model, A the factor of the adapter that the prompt's task is named after. No answer and no generation is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.algebra.bases import TOLERANCE
from vllm_merge.errors import UserInputError
from vllm_merge.tuning.batches import Batch
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.weights import layer_of

LAST_SHARE = 4  # one of so many layers is looked at


class NullSpace:
    """The objective. Rows of a task that is no adapter's name, or of none, take the mean over all adapters."""

    name = "null_space"
    needs_answers = False
    differentiable = True

    def __init__(self, adapters: Sequence[Adapter], modules: Sequence[str], device: torch.device) -> None:
        layers = list(dict.fromkeys(layer_of(module) for module in modules if layer_of(module) != module))
        last = set(layers[-max(1, len(layers) // LAST_SHARE) :])
        self._bases = {
            module: {a.name: _row_space(a.factors[module].A.to(device)) for a in adapters if module in a.factors}
            for module in modules
            if layer_of(module) in last
        }
        self._names = [adapter.name for adapter in adapters]
        for name in self._names:
            if not any(name in bases for bases in self._bases.values()):
                raise UserInputError(
                    f"adapter {name!r} changes nothing in the last {len(last)} of {len(layers)} layers, where the null-space "
                    "ratio is taken; use --objective entropy, or leave it out of the recipe"
                )

    def rows(self, model: TuningModel, batch: Batch) -> Tensor:
        sums: list[tuple[Tensor, Tensor]] = []
        seen = {module: partial(self._add, sums, batch, bases) for module, bases in self._bases.items()}
        watching: dict[str, Callable[[Tensor], None]] = dict(seen)
        with model.watched(watching):
            model.logits(batch.ids, batch.there)
        total = torch.stack([ratio for ratio, _ in sums]).sum(0)
        mean: Tensor = total / torch.stack([count for _, count in sums]).sum(0).clamp_min(1)
        return mean

    def _add(self, sums: list[tuple[Tensor, Tensor]], batch: Batch, bases: dict[str, Tensor], inputs: Tensor) -> None:
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        length = wide.square().sum(-1).clamp_min(1e-20)
        where = batch.there & ~batch.answered
        ratios, counts = torch.zeros_like(length[:, 0]), torch.zeros_like(length[:, 0])
        for name, basis in bases.items():
            mine = [float(task == name or task not in self._names) for task in batch.tasks]
            rows = torch.tensor(mine, dtype=wide.dtype, device=wide.device)
            outside = 1 - (wide @ basis.to(wide.dtype)).square().sum(-1) / length
            ratio = outside.clamp_min(1e-12).sqrt()
            ratios = ratios + rows * (ratio * where).sum(1) / where.sum(1).clamp_min(1)
            counts = counts + rows
        sums.append((ratios, counts))


def _row_space(a: Tensor) -> Tensor:
    """An orthonormal basis (d_in, rank) of the rows of A on their numerical support."""
    _, values, right = torch.linalg.svd(a.double(), full_matrices=False)
    basis: Tensor = right[values > TOLERANCE * values[0]].mT.to(a.dtype)
    return basis
