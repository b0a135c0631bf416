# SPDX-License-Identifier: Apache-2.0
"""Where an adapter's factors lie in memory, as arrays: a merge of thousands of factors looks none of them up by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, SupportsIndex

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # others are read as the last
ITEM_SIZES = np.array([dtype.itemsize for dtype in DTYPES])
ABSENT = -1
ADDRESS, ROWS, COLUMNS, STRIDE, DTYPE, ON_HOST = range(6)  # what `numbers` says of a factor


class Pairs(Protocol):
    """A and B of some modules, by position."""

    def __getitem__(self, index: SupportsIndex, /) -> tuple[Tensor, Tensor]: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Places:
    """Of every module of an adapter, its A and its B.

    numbers: (modules + 1, 2, 6) int64, the second axis A and B: address; rows; columns; elements from row to row, those of
    a row are adjacent; index into DTYPES; whether it is in host memory. scaling: (modules + 1,) float64. The last
    entry of both, which ABSENT finds, is that of a module that the adapter lacks. factors: what lies there, which this
    keeps.
    """

    position: Mapping[str, int]
    factors: Pairs
    numbers: NDArray[np.int64]
    scaling: NDArray[np.float64]

    @classmethod
    def of(cls, factors: Mapping[str, LoraFactors]) -> Places:
        pairs = [(_readable(pair.A), _readable(pair.B)) for pair in factors.values()]
        found = [
            [(t.data_ptr(), *t.shape, t.stride(0), DTYPES.index(t.dtype), t.device.type == "cpu") for t in pair]
            for pair in pairs
        ]
        absent = [(0, 0, 0, 0, DTYPES.index(t.dtype), 0) for t in pairs[0]] if pairs else [(0,) * 6] * 2
        return cls(
            {module: index for index, module in enumerate(factors)},
            pairs,
            np.array([*found, absent], dtype=np.int64),
            np.array([*(pair.scaling for pair in factors.values()), 0.0], dtype=np.float64),
        )

    def positions(self, modules: Sequence[str]) -> NDArray[np.int64]:
        """Where these modules stand here, ABSENT where they do not."""
        return np.array([self.position.get(module, ABSENT) for module in modules], dtype=np.int64)

    @cached_property
    def any_on_host(self) -> bool:
        """Whether a factor is in host memory."""
        return bool(self.numbers[:, :, ON_HOST].any())

    @cached_property
    def run(self) -> Tensor | None:
        """The bytes from the first factor in host memory to the last, (bytes,) uint8, if there is little else in between."""
        address, rows, columns, stride, dtype, on_host = np.moveaxis(self.numbers[:-1], -1, 0)
        if not len(self.factors) or not on_host.all() or (stride != columns).any():
            return None
        storage = self.factors[0][0].untyped_storage()
        sizes = rows * columns * ITEM_SIZES[dtype]
        # From a multiple of four on: where it is copied to, float32 must lie as well as it does here.
        first, last = int(address.min()) // 4 * 4, int((address + sizes).max())
        if not storage.data_ptr() <= first <= last <= storage.data_ptr() + storage.nbytes():
            return None
        if last - first > 2 * sizes.sum():
            return None
        whole = torch.empty(0, dtype=torch.uint8)
        return whole.set_(storage, first - storage.data_ptr(), (last - first,))  # type: ignore[call-overload,no-any-return]


def _readable(factor: Tensor) -> Tensor:
    """In a dtype that is known, with the elements of a row side by side."""
    if factor.dtype not in DTYPES:
        factor = factor.float()
    return factor if factor.stride(1) == 1 else factor.contiguous()
