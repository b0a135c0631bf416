# SPDX-License-Identifier: Apache-2.0
"""Reading a safetensors file whole, with every size checked before it is believed.

The layout (https://huggingface.co/docs/safetensors): 8 bytes, the header's length as a little-endian unsigned integer;
the header, a JSON object {tensor: {dtype, shape, data_offsets}}; the tensors' bytes, to the end of the file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_merge.adapters.words import shown
from vllm_merge.errors import UserInputError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_FILE_BYTES = 64 * 2**30
MAX_BASE_FILE_BYTES = 2**44
MAX_DIMENSIONS = 8
MAX_SIZE = 2**63  # of a dimension or an offset; beyond it arithmetic takes longer than a header should
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `start` and `end` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON text and the bytes of the whole file. Raises UserInputError where they do not fit."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = _header_length(file.read(LENGTH_BYTES), size, path)
        return file.read(length), size


def read_matrices(path: Path) -> dict[str, tuple[int, int]]:
    """The shapes of the floating-point matrices of `path`, whatever else it holds; for the weights of a base model.

    Raises UserInputError for a malformed header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = _json_header(file.read(_header_length(file.read(LENGTH_BYTES), size, path, MAX_BASE_FILE_BYTES)), path)
    found = {}
    for key, item in header.items():
        match item:
            case {"dtype": "F32" | "F16" | "BF16" | "F8_E4M3" | "F8_E5M2", "shape": [int(rows), int(columns)]}:
                found[key] = (rows, columns)
    return found


def header_text(data: bytes | bytearray | memoryview, size: int, where: Path) -> bytes:
    """The header's JSON text, of a file's first bytes. size: of the file; `where` names it in messages."""
    length = _header_length(bytes(data[:LENGTH_BYTES]), size, where)
    return bytes(data[LENGTH_BYTES : LENGTH_BYTES + length])


def parse_header(data: bytes | bytearray | memoryview, where: Path) -> dict[str, TensorEntry]:
    """The tensors that the file content `data` declares; `where` names the file in messages."""
    return entries_of(header_text(data, len(data), where), len(data), where)


def tensor_view(data: torch.Tensor, entry: TensorEntry) -> torch.Tensor:
    """The tensor of `entry` as a view of `data`, (bytes,) uint8 (a copy only where it is not aligned to its dtype)."""
    dtype = DTYPES[entry.dtype]
    mine = data[entry.start : entry.end]
    if mine.storage_offset() % dtype.itemsize:
        mine = mine.clone()
    return mine.view(dtype).view(entry.shape)


def _header_length(prefix: bytes, size: int, path: Path, most: int = MAX_FILE_BYTES) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise UserInputError(f"{path}: {size} bytes is too short for a safetensors file; copy the adapter again")
    length = int.from_bytes(prefix, "little")
    if size > most:
        raise UserInputError(f"{path}: {size:,} bytes; at most {most:,} are read; this is no LoRA adapter")
    if length > MAX_HEADER_BYTES:
        raise UserInputError(
            f"{path}: the header claims {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read; "
            "this is not a safetensors file of a LoRA adapter"
        )
    if LENGTH_BYTES + length > size:
        raise UserInputError(
            f"{path}: the header claims {length:,} bytes and the file has {size:,}; it is truncated, copy it again"
        )
    return length


def entries_of(raw: bytes, size: int, path: Path) -> dict[str, TensorEntry]:
    """The tensors that the header `raw` of a file of `size` bytes declares. Raises UserInputError where they are not all there."""
    data_start = LENGTH_BYTES + len(raw)
    header = _json_header(raw, path)
    entries = {key: _entry(key, item, data_start, size, path) for key, item in header.items()}
    _check_coverage(entries, data_start, size, path)
    return entries


def _json_header(raw: bytes, path: Path) -> dict[str, object]:
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise UserInputError(f"{path}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _entry(key: str, item: object, data_start: int, size: int, path: Path) -> TensorEntry:
    match item:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
            len(shape) <= MAX_DIMENSIONS
            and all(type(d) is int and 0 <= d <= MAX_SIZE for d in shape)
            and max(abs(begin), abs(end)) <= MAX_SIZE
        ):
            pass
        case _:
            raise UserInputError(f"{path}: tensor {shown(key)} is not described by dtype, shape and data_offsets")
    if dtype not in DTYPES:
        found = dtype if dtype.isalnum() and dtype.isascii() else shown(dtype)
        raise UserInputError(
            f"{path}: tensor {shown(key)} has dtype {found[:40]}; allowed are {', '.join(DTYPES)}: "
            "convert the adapter to one"
        )
    if not 0 <= begin <= end or data_start + end > size:
        raise UserInputError(
            f"{path}: tensor {shown(key)} claims bytes {begin:,} to {end:,} and the file holds {size - data_start:,}; "
            "it is truncated or damaged, copy it again"
        )
    expected = DTYPES[dtype].itemsize
    for dimension in shape:
        expected *= dimension
    if expected != end - begin:
        raise UserInputError(
            f"{path}: tensor {shown(key)} of shape {shown(shape)} and {dtype} needs {expected:,} bytes, "
            f"it has {end - begin:,}"
        )
    return TensorEntry(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_coverage(entries: Mapping[str, TensorEntry], data_start: int, size: int, path: Path) -> None:
    """The tensors must tile the data exactly: no gap that hides bytes, no overlap, no tail."""
    position = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise UserInputError(
                f"{path}: tensor {shown(key)} begins at byte {entry.start:,}, expected {position:,}: "
                "tensors overlap or leave a gap"
            )
        position = entry.end
    if position != size:
        raise UserInputError(f"{path}: {size - position:,} bytes follow the last tensor; the file is damaged")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result
