# SPDX-License-Identifier: Apache-2.0
"""Where an adapter's factors lie in memory, as arrays: a merge of thousands of factors looks none of them up by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # others are read as the last
ABSENT = -1


@dataclass(frozen=True, slots=True)
class Places:
    """Of every module of an adapter, its A and its B (the second axis, of 2).

    address: int64; rows, columns, stride: int64, stride in elements from row to row, elements of a row are adjacent; dtype:
    int64, an index into DTYPES; on_host: bool; scaling: (modules,) float64. factors: what lies there, which this keeps.
    """

    position: Mapping[str, int]
    factors: Sequence[tuple[Tensor, Tensor]]
    address: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    stride: NDArray[np.int64]
    dtype: NDArray[np.int64]
    on_host: NDArray[np.bool_]
    scaling: NDArray[np.float64]

    @classmethod
    def of(cls, factors: Mapping[str, LoraFactors]) -> Places:
        pairs = [tuple(_readable(tensor) for tensor in (pair.A, pair.B)) for pair in factors.values()]
        numbers = np.array(
            [
                [(t.data_ptr(), *t.shape, t.stride(0), DTYPES.index(t.dtype), t.device.type == "cpu") for t in pair]
                for pair in pairs
            ],
            dtype=np.int64,
        ).reshape(len(pairs), 2, 6)
        address, rows, columns, stride, dtype, on_host = np.moveaxis(numbers, -1, 0)
        return cls(
            {module: index for index, module in enumerate(factors)},
            [(a, b) for a, b in pairs],
            address,
            rows,
            columns,
            stride,
            dtype,
            on_host.astype(bool),
            np.array([pair.scaling for pair in factors.values()], dtype=np.float64),
        )

    def positions(self, modules: Sequence[str]) -> NDArray[np.int64]:
        """Where these modules stand here, ABSENT where they do not."""
        return np.array([self.position.get(module, ABSENT) for module in modules], dtype=np.int64)


def _readable(factor: Tensor) -> Tensor:
    """In a dtype that is known, with the elements of a row side by side."""
    if factor.dtype not in DTYPES:
        factor = factor.float()
    return factor if factor.stride(1) == 1 else factor.contiguous()
