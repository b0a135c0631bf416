# SPDX-License-Identifier: Apache-2.0
"""What an adapter's file holds, by its header and the configuration beside it: checked, but for the values.

Adapters that were trained alike have the same header, byte for byte. What is known of one is known of the next.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_merge.adapters.factors import Layout, natural_key
from vllm_merge.adapters.peft_config import LoraConfig
from vllm_merge.adapters.places import DTYPES as PLACED_DTYPES
from vllm_merge.adapters.tensor_file import DTYPES, TensorEntry, entries_of
from vllm_merge.adapters.tensor_names import BASE_COPY, FULL_WEIGHT_HINT, PREFIX, Part, TensorName, parse_name
from vllm_merge.adapters.words import shown
from vllm_merge.errors import UserInputError

_KEPT = 8  # layouts
_KEPT_BYTES = 4 << 20  # of a header, of which the rest is some multiple


@dataclass(frozen=True, slots=True)
class FileModule:
    """Where the factors of a module lie in the file, its scaling, and whether it is an embedding."""

    a: TensorEntry
    b: TensorEntry
    scaling: float
    embedding: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, eq=False)
class FileLayout:
    """The modules of a file, in natural order, and what the user should know of it."""

    modules: Mapping[str, FileModule]
    warnings: tuple[str, ...]

    @cached_property
    def layout(self) -> Layout:
        """As that of an adapter with these modules."""
        return Layout((name, module.shape, module.rank, module.embedding) for name, module in self.modules.items())

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Where each module stands among all."""
        return {name: index for index, name in enumerate(self.modules)}

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """As `Places.numbers`, with offsets into the file for addresses, and nothing in host memory."""
        found = [[_numbers(module.a), _numbers(module.b)] for module in self.modules.values()]
        absent = [(0, 0, 0, 0, dtype, 0) for *_, dtype, _ in found[0]]
        return np.array([*found, absent], dtype=np.int64)

    @cached_property
    def scaling(self) -> NDArray[np.float64]:
        """As `Places.scaling`."""
        return np.array([*(module.scaling for module in self.modules.values()), 0.0])

    @cached_property
    def runs(self) -> tuple[TensorEntry, ...]:
        """Factors of one dtype that follow each other in the file, as if they were one tensor."""
        entries = sorted(
            (entry for module in self.modules.values() for entry in (module.a, module.b)),
            key=lambda entry: entry.start,
        )
        found: list[TensorEntry] = []
        for entry in entries:
            start = entry.start
            if found and found[-1].end == start and found[-1].dtype == entry.dtype:
                start = found.pop().start
            size = (entry.end - start) // DTYPES[entry.dtype].itemsize
            found.append(TensorEntry(entry.dtype, (size,), start, entry.end))
        return tuple(found)


def _numbers(entry: TensorEntry) -> tuple[int, ...]:
    rows, columns = entry.shape
    return entry.start, rows, columns, columns, PLACED_DTYPES.index(DTYPES[entry.dtype]), 0


def file_layout(header: bytes, size: int, config: LoraConfig, file: Path) -> FileLayout:
    """The layout of a safetensors file. header: its JSON text; size: bytes of the file.

    Raises UserInputError for anything that is not a plain LoRA that fits its configuration.
    """
    find = _layout if len(header) <= _KEPT_BYTES else _layout.__wrapped__
    try:
        with _one_at_a_time:
            return find(header, size, config, Path(file.name))
    except UserInputError as error:
        raise UserInputError(f"{file.parent}/{error}") from None


_one_at_a_time = threading.Lock()  # this is interpreter's work; who waits mostly finds it done


@lru_cache(maxsize=_KEPT)
def _layout(header: bytes, size: int, config: LoraConfig, where: Path) -> FileLayout:
    """Errors begin with the file's name, `where`; that of its folder comes before."""
    entries = entries_of(header, size, where)
    copies = {key for key in entries if key.endswith(BASE_COPY)}
    pairs = _pairs({key: entry for key, entry in entries.items() if key not in copies}, where)
    ranks = config.ranks(pairs)
    for module, pair in pairs.items():
        _check_pair(module, pair, ranks[module], where)
    for key in copies:
        module = key.removeprefix(PREFIX).removesuffix(BASE_COPY)
        if module not in pairs:
            raise UserInputError(
                f"{where}: tensor {shown(key)} is a weight of a module without LoRA; {FULL_WEIGHT_HINT}"
            )
    ignored = [f"tensor {shown(key)} is a copy of a base weight and is ignored" for key in sorted(copies)]
    scalings = config.scalings(ranks)
    modules = {
        module: FileModule(
            pairs[module]["A"].entry, pairs[module]["B"].entry, scalings[module], pairs[module]["A"].name.embedding
        )
        for module in sorted(pairs, key=natural_key)
    }
    return FileLayout(modules, (*ignored, *config.warnings(pairs)))


@dataclass(frozen=True, slots=True)
class _Factor:
    """A tensor of the file."""

    key: str
    name: TensorName
    entry: TensorEntry


def _pairs(entries: Mapping[str, TensorEntry], where: Path) -> dict[str, dict[Part, _Factor]]:
    """What there is of A and B, of every module."""
    pairs: dict[str, dict[Part, _Factor]] = {}
    for key, entry in sorted(entries.items()):
        name = parse_name(key, where)
        pair = pairs.setdefault(name.module, {})
        if (other := pair.get(name.part)) is not None:
            raise UserInputError(
                f"{where}: module {name.module!r} has two {name.kind}, {shown(other.key)} and {shown(key)}; "
                "save one adapter per file"
            )
        pair[name.part] = _Factor(key, name, entry)
    if not pairs:
        raise UserInputError(f"{where}: no lora_A and lora_B tensors; this adapter changes nothing")
    return pairs


def _check_pair(module: str, pair: Mapping[Part, _Factor], expected: int, where: Path) -> None:
    kinds = sorted(factor.name.kind for factor in pair.values())
    embedding = next(iter(pair.values())).name.embedding
    wanted = [TensorName(module, "A", embedding).kind, TensorName(module, "B", embedding).kind]
    if kinds != wanted:
        missing = [kind for kind in wanted if kind not in kinds]
        found = f"{' and '.join(kinds)} but no {' and '.join(missing)}"
        raise UserInputError(f"{where}: module {module!r} has {found}; save the adapter again")
    shape_a, shape_b = pair["A"].entry.shape, pair["B"].entry.shape
    both = f"{wanted[0]} {list(shape_a)} and {wanted[1]} {list(shape_b)}"
    if len(shape_a) != 2 or len(shape_b) != 2:
        raise UserInputError(
            f"{where}: module {module!r} has {both}; only linear layers and embeddings, whose factors have two "
            "dimensions, can be merged"
        )
    if shape_a[0] != shape_b[1]:
        raise UserInputError(
            f"{where}: module {module!r}: {wanted[1]} {list(shape_b)} · {wanted[0]} {list(shape_a)} do not multiply; "
            f"expected {'(features, r) and (r, tokens)' if embedding else '(d_out, r) and (r, d_in)'}"
        )
    if 0 in shape_a + shape_b:
        raise UserInputError(
            f"{where}: module {module!r} has {both}; a rank of 0 or an "
            "empty factor usually means that sharded weights were not gathered before saving"
        )
    if shape_a[0] != expected:
        raise UserInputError(
            f"{where}: module {module!r} has rank {shape_a[0]} and adapter_config.json says {expected}; "
            "correct r or rank_pattern, on which the scaling depends"
        )
