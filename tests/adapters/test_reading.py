# SPDX-License-Identifier: Apache-2.0
"""From a file into memory: what is used is what was hashed, however it is cut into pieces and wherever it goes."""

from __future__ import annotations

import errno
import gc
import hashlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.adapters.conftest import MakeFolder, Q, pair
from vllm_merge import Adapter
from vllm_merge.adapters import file_factors, peft, reading
from vllm_merge.adapters.peft import WEIGHTS_FILE, hash_adapter, parse_adapter, read_adapter, read_bytes, read_each
from vllm_merge.adapters.places import Places
from vllm_merge.adapters.reading import ALIGNED, host_memory, read_hashed
from vllm_merge.errors import UserInputError

MODULE = Q.removeprefix("base_model.model.")
RawFile = Callable[[Any, bytes], bytes]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Watched:
    """A hash that does something else, too, when it has its first piece."""

    def __init__(self, then: Callable[[], object]) -> None:
        self.digest, self._then = hashlib.sha256(), then

    def update(self, piece: memoryview) -> None:
        self.digest.update(piece)
        self._then()
        self._then = lambda: None


@pytest.fixture(params=["to the host", "past a piece"])
def passing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 bytes, that are read to where they stay, or pass through one as those for a GPU do."""
    monkeypatch.setattr(reading, "PIECE_BYTES", 64)
    if request.param == "past a piece":
        monkeypatch.setattr(reading, "_passing", lambda data: torch.empty(64, dtype=torch.uint8))


def test_pieces_make_the_whole(folder: MakeFolder, passing: None) -> None:
    path = folder(tensors=pair() | pair(Q.replace("q_proj", "k_proj"), dtype=torch.bfloat16))
    content = (path / WEIGHTS_FILE).read_bytes()
    read = read_bytes(path)
    assert read.data.numpy().tobytes() == content
    assert read.head == content[: len(read.head)]
    assert len(read.head) == 8 + int.from_bytes(content[:8], "little") > 2 * 64
    fields = '{"alpha_pattern":[],"lora_alpha":8.0,"r":4,"rank_pattern":[],"use_rslora":false}'
    expected = hashlib.sha256(b"vllm-merge adapter 1\n" + fields.encode() + b"\n" + content).hexdigest()
    assert read.content_hash == hash_adapter(path) == expected, "an adapter's identity, which never changes"
    for name, tensor in pair().items():
        found = read_adapter(path).factors[MODULE]
        assert torch.equal(found.A if "lora_A" in name else found.B, tensor)


def test_a_file_that_is_cut_off_while_it_is_read(folder: MakeFolder, passing: None) -> None:
    file = folder() / WEIGHTS_FILE
    size = file.stat().st_size
    digest: Any = Watched(lambda: os.truncate(file, 100))
    with pytest.raises(UserInputError, match=rf"ended after 100 of {size} bytes; it changed while it was read"):
        read_hashed(file, digest, host_memory)


def test_a_file_that_is_written_over_while_it_is_read(folder: MakeFolder, passing: None) -> None:
    """Pieces of two contents are a content of their own, with a hash of its own."""
    file = folder() / WEIGHTS_FILE
    before = file.read_bytes()
    digest: Any = Watched(lambda: file.write_bytes(b"\xff" * len(before)))
    data, head = read_hashed(file, digest, host_memory)
    assert data.numpy().tobytes() == before[:64] + b"\xff" * (len(before) - 64)
    assert digest.digest.hexdigest() == hashlib.sha256(data.numpy().tobytes()).hexdigest()
    assert head == data[: len(head)].numpy().tobytes()


@pytest.mark.parametrize("size", [0, 3, 8, 4 << 20, (4 << 20) + 1])
@pytest.mark.parametrize("first", [0, 8, 9, 1000])
def test_tensors_are_aligned_in_host_memory(size: int, first: int) -> None:
    data = host_memory(size, first)
    assert (data.shape, data.dtype) == ((size,), torch.uint8)
    assert size < 4 << 20 or (data.data_ptr() + first) % ALIGNED == 0
    data.fill_(7)
    assert not size or data[-1] == 7


def test_memory_of_a_kernel_without_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *advice: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Pages)
    assert host_memory(5 << 20, 8).fill_(7)[-1] == 7


def test_large_memory_lives_as_long_as_a_factor_of_it(folder: MakeFolder) -> None:
    content = pair(d_in=300_000)
    found = read_adapter(folder(tensors=content)).factors[MODULE]
    gc.collect()
    others = [host_memory(8 << 20, 0).fill_(1) for _ in range(3)]
    assert torch.equal(found.A, content[f"{Q}.lora_A.weight"])
    assert len(others) == 3


def test_files_with_one_header_share_what_it_says(folder: MakeFolder, make_pair: Callable[..., Any]) -> None:
    first = read_adapter(folder())
    second = read_adapter(folder(tensors={key: 2 * tensor for key, tensor in make_pair().items()}))
    assert first.layout is second.layout
    assert torch.equal(2 * first.factors[MODULE].A, second.factors[MODULE].A)
    assert first.content_hash != second.content_hash
    other = read_adapter(folder({"lora_alpha": 4}))
    assert (other.factors[MODULE].scaling, first.factors[MODULE].scaling) == (1.0, 2.0)
    with pytest.raises(UserInputError, match=r"rank 4 and adapter_config\.json says 3"):
        read_adapter(folder({"r": 3}))
    assert read_adapter(folder()).layout is first.layout


@pytest.mark.parametrize("shift", range(5))
def test_places_are_those_of_the_factors(folder: MakeFolder, raw_file: RawFile, shift: int) -> None:
    """Also where the file lies so that factors are at addresses that no view can be made of."""
    shapes = {"m.layers.10.q": (4, 6, 5), "m.layers.9.q": (4, 3, 7)}
    header: dict[str, Any] = {}
    end = 0
    for module, (rank, d_in, d_out) in shapes.items():
        for part, shape, dtype, size in (("A", [rank, d_in], "F32", 4), ("B", [d_out, rank], "BF16", 2)):
            start, end = end, end + shape[0] * shape[1] * size
            key = f"base_model.model.{module}.lora_{part}.weight"
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    path = folder({"lora_alpha": 2}, raw=raw_file(header, bytes(range(end))))
    adapter = parse_adapter(read_bytes(path, memory=lambda size, first: host_memory(size + shift, first)[shift:]))
    found, expected = adapter.places, Places.of(dict(adapter.factors))
    assert list(adapter.factors) == ["m.layers.9.q", "m.layers.10.q"]
    assert (found.numbers == expected.numbers).all()
    assert (found.scaling == expected.scaling).all()
    assert found.positions(["m.layers.10.q", "m.layers.2.q"]).tolist() == [1, -1]
    for index, module in enumerate(adapter.factors):
        for one, other in zip(found.factors[np.int64(index)], expected.factors[index], strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        assert adapter.factors[module].rank == 4
    assert len(found.factors) == 2
    run = found.run
    assert (run is None) == (shift % 4 > 0)
    assert run is None or run.numpy().tobytes() == bytes(range(end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-nan", "last nan"])
def test_values_that_are_not_finite(
    folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, part: str, value: str
) -> None:
    monkeypatch.setattr(file_factors, "_BLOCK_BYTES", 16)
    content = pair(dtype=dtype)
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = -1 if value == "last nan" else torch.tensor(float(value), dtype=dtype).view(width).item()
    content[f"{Q}.lora_{part}.weight"].view(width)[-1, -1] = bits
    with pytest.raises(UserInputError, match=rf"module '{MODULE}': lora_{part} has 1 NaN or infinite values"):
        read_adapter(folder(tensors=content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_greatest_and_the_least_are_finite(folder: MakeFolder, dtype: torch.dtype, sign: int) -> None:
    about = torch.finfo(dtype)
    content = {name: tensor.fill_(sign * about.max) for name, tensor in pair(dtype=dtype).items()}
    content[f"{Q}.lora_A.weight"][0, :3] = torch.tensor(
        [sign * 0.0, sign * about.tiny, sign * about.smallest_normal / 2]
    )
    assert torch.equal(read_adapter(folder(tensors=content)).factors[MODULE].A, content[f"{Q}.lora_A.weight"])


def test_the_copy_of_a_base_weight_may_hold_anything(folder: MakeFolder) -> None:
    """It lies between factors, and is not used."""
    content = pair()
    content[f"{Q}.base_layer.weight"] = torch.full((5, 6), float("nan"))
    assert list(read_adapter(folder(tensors=content)).factors) == [MODULE]


@pytest.mark.gpu
@gpu
def test_a_file_on_its_way_to_a_gpu(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or many pieces; aligned there; the same content, hash and places; never whole on the host."""
    content = pair(d_in=300_000) | pair(Q.replace("q_proj", "k_proj"), dtype=torch.bfloat16)
    path = folder(tensors=content)
    here = read_adapter(path)
    for size in (4 << 20, 1 << 16):
        monkeypatch.setattr(reading, "PIECE_BYTES", size)
        there = read_adapter(path, device="cuda")
        assert there.content_hash == here.content_hash
        for module, mine in here.factors.items():
            found = there.factors[module]
            for one, other in ((found.A, mine.A), (found.B, mine.B)):
                assert one.is_cuda
                assert torch.equal(one.cpu(), other)
        assert (there.places.numbers == Places.of(dict(there.factors)).numbers).all()
        assert there.places.numbers[:-1, :, 0].min() % ALIGNED == 0
    content[f"{Q}.lora_A.weight"][1, 5] = float("nan")
    with pytest.raises(UserInputError, match="lora_A has 1 NaN"):
        read_adapter(folder(tensors=content), device="cuda")


@pytest.mark.gpu
@gpu
def test_readers_work_on_the_stream_of_who_asked() -> None:
    stream = torch.cuda.Stream()

    def read(index: int) -> Adapter:
        assert torch.cuda.current_stream() == stream
        return Adapter(str(index), {})

    with torch.cuda.stream(stream):
        assert len(read_each(read, range(4))) == 4


def test_each_is_read_and_the_first_to_fail_is_told(folder: MakeFolder) -> None:
    path = folder()
    adapters = read_each(lambda name: read_adapter(path, name), ["a", "b", "c"])
    assert [adapter.name for adapter in adapters] == ["a", "b", "c"]
    with pytest.raises(UserInputError, match="no_1"):
        read_each(peft.read_adapter, [path, Path("no_1"), Path("no_2")])
