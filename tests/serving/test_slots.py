# SPDX-License-Identifier: Apache-2.0
"""Filling a slot: the lists of buffers and views, the plain twin, and on a GPU the kernel against it."""

import os
import subprocess
import sys

import pytest
import torch

from vllm_merge.serving.memory import slots as slots_module
from vllm_merge.serving.memory.slots import SlotBuffer, SlotLayout, fill_with_torch, flat_copy

SHAPES = [(8, 96), (160, 8), (8, 64), (96, 8), (8, 33), (1000, 8)]


def layout(device: str, dtype: torch.dtype, slots: int = 3) -> SlotLayout:
    buffers = [
        SlotBuffer(
            f"layer{i // 2}", f"layer{i // 2}", "AB"[i % 2], torch.full((slots, 1, *s), 7.0, dtype=dtype, device=device)
        )
        for i, s in enumerate(SHAPES)
    ]
    return SlotLayout(buffers)


def views(device: str, dtype: torch.dtype, seed: int) -> list[torch.Tensor | None]:
    """Random ranks and widths, one buffer without a source, some views of wider tensors (as tensor parallelism slices)."""
    generator = torch.Generator().manual_seed(seed)
    result: list[torch.Tensor | None] = []
    for i, (rows, columns) in enumerate(SHAPES):
        wide = torch.randn(rows, columns + 5, generator=generator).to(device, dtype)
        cut = int(torch.randint(1, 9, (), generator=generator))
        result.append(wide[:cut, 3 : 3 + columns] if i % 2 == 0 else wide[:, :cut])
    result[2] = None
    return result


def expected(shape: tuple[int, int], view: torch.Tensor | None) -> torch.Tensor:
    full = torch.zeros(shape)
    if view is not None:
        full[: view.shape[0], : view.shape[1]] = view.float().cpu()
    return full


def check(device: str, dtype: torch.dtype, seed: int) -> None:
    slots = layout(device, dtype)
    given = views(device, dtype, seed)
    slots.fill(1, slots.source(given))
    for buffer, view in zip(slots.buffers, given, strict=True):
        assert torch.equal(buffer.stacked[1, 0].float().cpu(), expected(buffer.shape, view))
        assert (buffer.stacked[[0, 2]] == 7).all(), "no other slot was touched"


@pytest.mark.parametrize("seed", range(5))
def test_a_slot_holds_its_source_and_zeros_and_no_other_slot_changes(seed):
    check("cpu", torch.float32, seed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_the_kernel_does_what_its_twin_does(dtype, seed):
    check("cuda", dtype, seed)
    kernel, twin = layout("cuda", dtype), layout("cuda", dtype)
    given = views("cuda", dtype, seed)
    kernel.fill(2, kernel.source(given))
    fill_with_torch(twin.buffers, 2, given)
    assert all(torch.equal(a.stacked, b.stacked) for a, b in zip(kernel.buffers, twin.buffers, strict=True))


@pytest.mark.parametrize("bad", ["too many rows", "columns apart", "another dtype"])
def test_what_cannot_be_copied_is_refused_before_a_step_needs_it(bad):
    slots = layout("cpu", torch.float32)
    given = views("cpu", torch.float32, 0)
    rows, columns = SHAPES[0]
    given[0] = {
        "too many rows": torch.zeros(rows + 1, columns),
        "columns apart": torch.zeros(columns, rows).mT,
        "another dtype": torch.zeros(rows, columns, dtype=torch.float64),
    }[bad]
    with pytest.raises(ValueError, match="layer0 A"):
        slots.source(given)


def test_what_comes_from_outside_is_copied_in_pieces(monkeypatch):
    monkeypatch.setattr(slots_module, "COPIED_AT_ONCE", 100)
    here, outside = torch.empty(10), torch.empty(10, device="meta")  # 40 bytes
    sizes = [len(some) for some in slots_module._pieces([(here, outside)] * 7)]
    assert (sum(sizes), max(sizes)) == (7, 3)
    assert [len(some) for some in slots_module._pieces([(here, here)] * 7)] == [7]


def test_a_flat_copy_is_one_aligned_storage():
    factors = {"a": (torch.randn(3, 7), torch.randn(5, 3)), "b": (torch.randn(1, 1), torch.randn(2, 1))}
    storage, copies = flat_copy(factors, torch.device("cpu"), torch.bfloat16)
    for module, pair in factors.items():
        for original, copy in zip(pair, copies[module], strict=True):
            assert torch.equal(copy, original.to(torch.bfloat16))
            assert copy.untyped_storage().data_ptr() == storage.untyped_storage().data_ptr()
            assert copy.storage_offset() * copy.element_size() % 16 == 0


INTERPRETED = """
import torch
from vllm_merge.serving.memory.slot_kernel import fill_slot

torch.manual_seed(0)
shapes, tile = [(8, 96), (160, 8), (8, 33)], 256
for slot in (0, 1, 2):
    stacked = [torch.full((3, 1, *shape), 7.0) for shape in shapes]
    wide = torch.randn(5, 110)
    views = [wide[:, 3:99], torch.randn(160, 6)[:, :4], None]
    tiles = torch.tensor([(i, s) for i, (r, c) in enumerate(shapes) for s in range(0, r * c, tile)])
    targets = torch.tensor([(t.data_ptr(), r * c, c) for t, (r, c) in zip(stacked, shapes)])
    rows = [(v.data_ptr(), *v.shape, v.stride(0)) if v is not None else (0, 0, 0, 0) for v in views]
    fill_slot(tiles, targets, torch.tensor(rows), slot, tile, torch.float32)
    for buffer, view in zip(stacked, views):
        expected = torch.full_like(buffer, 7.0)
        expected[slot] = 0
        if view is not None:
            expected[slot, 0, : view.shape[0], : view.shape[1]] = view
        assert torch.equal(buffer, expected), slot
print("equal")
"""


def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
