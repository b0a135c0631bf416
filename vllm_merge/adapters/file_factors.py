# SPDX-License-Identifier: Apache-2.0
"""The factors of an adapter that was read from a file, as views of its bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import SupportsIndex

import torch
from torch import Tensor

from vllm_merge.adapters.factors import Layout, LazyFactors, LoraFactors
from vllm_merge.adapters.file_layout import FileLayout
from vllm_merge.adapters.places import ADDRESS, DTYPE, ITEM_SIZES, ON_HOST, Places
from vllm_merge.adapters.tensor_file import DTYPES, TensorEntry, tensor_view
from vllm_merge.adapters.tensor_names import Part, TensorName

_INFINITY: Mapping[str, int] = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}  # the bits
_BLOCK_BYTES = 1 << 20  # looked at at once: what was read for one look is still near for the next


class FileFactors(LazyFactors):
    """Views that are made when they are asked for: a GPU that is told where factors lie needs none. data: (bytes,) uint8."""

    def __init__(self, data: Tensor, file: FileLayout) -> None:
        self._data, self._file = data, file
        self._made: dict[str, LoraFactors] = {}

    @property
    def layout(self) -> Layout:
        """Of the file."""
        return self._file.layout

    def __getitem__(self, module: str) -> LoraFactors:
        if module not in self._made:
            found = self._file.modules[module]
            a, b = tensor_view(self._data, found.a), tensor_view(self._data, found.b)
            self._made[module] = LoraFactors(a, b, found.scaling, found.embedding)
        return self._made[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.modules)

    def __len__(self) -> int:
        return len(self._file.modules)

    def places(self) -> Places:
        """Where the factors lie."""
        numbers = self._file.numbers.copy()
        factors = numbers[:-1]
        factors[..., ADDRESS] += self._data.data_ptr()
        factors[..., ON_HOST] = self._data.device.type == "cpu"
        if (factors[..., ADDRESS] % ITEM_SIZES[factors[..., DTYPE]]).any():  # a factor that no view can be made of
            return Places.of(self)
        return Places(self._file.position, _FactorPairs(self), numbers, self._file.scaling)

    def not_finite(self) -> tuple[TensorName, int] | None:
        """The first factor with values that are not finite, and how many those are; None where there is none."""
        finite = _is_finite_on_host if self._data.device.type == "cpu" else _is_finite
        if all(finite(self._data, run) for run in self._file.runs):
            return None
        return next(
            (TensorName(module, part, pair.embedding), count)
            for module, pair in self.items()
            for part, tensor in _parts(pair)
            if (count := int((~torch.isfinite(tensor)).sum()))
        )


class _FactorPairs:
    """A and B of every module."""

    def __init__(self, factors: FileFactors) -> None:
        self._factors, self._names = factors, tuple(factors)

    def __getitem__(self, index: SupportsIndex, /) -> tuple[Tensor, Tensor]:
        pair = self._factors[self._names[index]]
        return pair.A, pair.B

    def __len__(self) -> int:
        return len(self._names)


def _parts(pair: LoraFactors) -> tuple[tuple[Part, Tensor], tuple[Part, Tensor]]:
    return ("A", pair.A), ("B", pair.B)


def _is_finite_on_host(data: Tensor, run: TensorEntry) -> bool:
    """Among the numbers of either sign, infinity and NaN have the greatest patterns of bits.

    NumPy works in this thread alone. Files are read in several, and torch would use all cores in each.
    """
    size, greatest = DTYPES[run.dtype].itemsize, _INFINITY[run.dtype]
    mine = data[run.start : run.end].numpy()
    for start in range(0, len(mine), _BLOCK_BYTES):
        block = mine[start : start + _BLOCK_BYTES]
        if block.view(f"<i{size}").max() >= greatest or block.view(f"<u{size}").max() >= greatest | 1 << 8 * size - 1:
            return False
    return True


def _is_finite(data: Tensor, run: TensorEntry) -> bool:
    least, most = torch.aminmax(tensor_view(data, run))  # which pass NaN on
    return bool(least.isfinite() & most.isfinite())
