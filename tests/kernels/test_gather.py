# SPDX-License-Identifier: Apache-2.0
"""The gathering kernel against plain copies: padding, scales, strides, dtypes, and the flag of what does not fit."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from tests.adapters_in_memory import map_factors
from tests.kernels.running import both_ways, run_all
from vllm_merge import Adapter, LoraFactors
from vllm_merge.adapters.arrangement import arranged
from vllm_merge.adapters.pieces import Pieces, all_aligned
from vllm_merge.adapters.stacking import Sources, gather_stacks, group_modules, stack_group

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gathered(
    pieces: list[tuple[Tensor | None, int, int, float]],
    out: Tensor,
    dtype: torch.dtype,
    *,
    widest: int = 64,
    left: int = 2,
    aligned: bool = False,
) -> int:
    """Write each (source, rows, columns, scale) to out[i], from row 1, column `left` on. Returns the flag.

    widest: columns up to which a piece is narrow. aligned: whether all places must turn out to be.
    """
    from vllm_merge.kernels.gather import gather

    count, height, width = out.shape
    lines: list[tuple[int, ...]] = []
    for index, (source, rows, columns, _) in enumerate(pieces):
        given = (0, 0, 0, 0) if source is None else (source.data_ptr(), *source.shape, source.stride(0))
        lines.append((*given, rows, columns, index * height * width + width + left, width))
    assert len(pieces) == count
    numbers = np.array(lines, dtype=np.int64).T.copy()
    told = Pieces(
        numbers,
        np.array([scale for *_, scale in pieces]),
        np.full(count, -1),
        ((dtype, 0, count),),
        all_aligned(numbers, np.full(count, dtype.itemsize)),
        widest,
        max(rows * columns for _, rows, columns, _ in pieces),
    )
    assert told.aligned == aligned
    weights = torch.tensor([-9.0, 0.0], dtype=torch.float64, device=out.device)
    gather(told.table(out.device), weights, out.view(-1), told, lambda: None)
    assert weights[0] == -9
    return int(weights[-1])


def check_pieces_of_every_dtype(device: str) -> None:
    """Cut out of wider tensors, smaller than what is written, absent, and longer than one program takes."""
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for target in DTYPES:
            wide = torch.randn(4, 90, 80, generator=generator).to(device, dtype)
            pieces: list[tuple[Tensor | None, int, int, float]] = [
                (wide[0, :7, 3:40], 9, 50, 0.5),
                (wide[1, :90, :70], 90, 70, -1.25),
                (None, 5, 6, 2.0),
                (wide[2, :1, :1], 1, 1, 0.0),
                (wide[3, :3], 3, 80, 3.0),
            ]
            out = torch.full((len(pieces), 95, 85), 7.0, dtype=target, device=device)
            expected = out.clone()
            for index, (source, rows, columns, scale) in enumerate(pieces):
                expected[index, 1 : 1 + rows, 2 : 2 + columns] = 0
                if source is not None:
                    inside = expected[index, 1 : 1 + source.shape[0], 2 : 2 + source.shape[1]]
                    inside.copy_(source.float() * scale)
            assert gathered(pieces, out, dtype) == 0
            torch.testing.assert_close(out, expected, rtol=_rounding(device, target), atol=0.0)


def _rounding(device: str, target: torch.dtype) -> float:
    return 2**-7 if (device, target) == ("cpu", torch.bfloat16) else 0.0  # the interpreter cuts off


def check_pieces_that_lie_well(device: str) -> None:
    """Several elements are read and written at once where every place is a multiple of them; narrow and wide pieces."""
    generator = torch.Generator().manual_seed(3)
    for unit in (4, 8):
        for dtype, target in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
            wide = torch.randn(4, 300, 1200, generator=generator).to(device, dtype)
            pieces: list[tuple[Tensor | None, int, int, float]] = [
                (wide[0, :290, : 2 * unit], 300, 2 * unit, -0.5),  # the columns of a B
                (wide[1, :3, : 1040 + unit], 4, 1040 + unit, 1.0),  # the rows of an A, of more than a tile
                (wide[2, :33, unit : 3 * unit], 40, 4 * unit, 2.0),
                (None, 3, 8, 1.0),
            ]
            out = torch.full((4, 302, 1104), 7.0, dtype=target, device=device)
            expected = out.clone()
            for block, (source, rows, columns, scale) in zip(expected, pieces, strict=True):
                block[1 : 1 + rows, 16 : 16 + columns] = 0
                if source is not None:
                    block[1 : 1 + source.shape[0], 16 : 16 + source.shape[1]].copy_(source.float() * scale)
            assert gathered(pieces, out, dtype, widest=2 * unit, left=16, aligned=unit == 8) == 0
            torch.testing.assert_close(out, expected, rtol=_rounding(device, target), atol=0.0)


def check_several_launches(device: str) -> None:
    """As of factors that are too many for one, with a pause before each; what is wrong in the first is not forgotten."""
    source = torch.full((5, 8), 3.0, device=device)
    source[4, 4] = float("nan")
    out = torch.zeros(3, 5, 8, device=device)
    lines = [(source.data_ptr(), rows, 8, 8, rows, 8, 40 * i, 8) for i, rows in enumerate((5, 4, 3))]
    numbers = np.array(lines, dtype=np.int64).T.copy()
    told = Pieces(
        numbers, np.ones(3), np.zeros(3, dtype=np.int64), ((torch.float32, 0, 1), (torch.float32, 1, 3)), True, 8, 40
    )
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    paused: list[bool] = []
    gather_now = import_module("vllm_merge.kernels.gather").gather
    gather_now(told.table(out.device), weights, out.view(-1), told, lambda: paused.append(bool(out[0].any())))
    assert paused == [False, True]
    assert int(weights[-1]) == 1
    assert out.nan_to_num(9.0).sum((1, 2)).tolist() == [39 * 3.0 + 9.0, 96.0, 72.0]


def check_random_shapes(device: str) -> None:
    """Pieces of any size, narrow or wide, with nothing written beside them."""
    generator = torch.Generator().manual_seed(1)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(10):
        rows, columns = integer(1, 130), integer(1, 130)
        pieces: list[tuple[Tensor | None, int, int, float]] = []
        for _ in range(integer(1, 5)):
            source = torch.randn(integer(1, rows + 1), integer(1, columns + 1), generator=generator).to(device)
            pieces.append((source, rows, columns, float(torch.randn((), generator=generator))))
        out = torch.full((len(pieces), rows + 2, columns + 4), 7.0, device=device)
        assert gathered(pieces, out, torch.float32, widest=integer(1, 200)) == 0
        for mine, (source, _, _, scale) in zip(out, pieces, strict=True):
            assert source is not None
            block = torch.zeros(rows, columns, device=device)
            block[: source.shape[0], : source.shape[1]] = source * torch.tensor(scale, device=device)
            assert torch.equal(mine[1 : 1 + rows, 2 : 2 + columns], block)
            mine[1 : 1 + rows, 2 : 2 + columns] = 7
            assert (mine == 7).all(), "nothing was written beside the piece"


def check_what_does_not_fit_is_flagged(device: str) -> None:
    """A product beyond the target's dtype, infinity and NaN; not the largest value there is, nor one past the piece."""
    cases: list[tuple[float, float, torch.dtype, int]] = [
        (65504.0, 1.0, torch.float16, 0),
        (-65504.0, 1.0, torch.float16, 0),
        (65504.0, 1.5, torch.float16, 1),
        (-65504.0, 2.0, torch.float16, 1),
        (65504.0, 1.5, torch.bfloat16, 0),
        (1e30, 1e10, torch.float32, 1),
        (float("nan"), 1.0, torch.float32, 1),
        (float("-inf"), 1.0, torch.bfloat16, 1),
        (float("inf"), 0.0, torch.float32, 1),
    ]
    for value, scale, target, flag in cases:
        source = torch.zeros(70, 70, device=device)
        source[69, 68] = value
        out = torch.zeros(2, 80, 80, dtype=target, device=device)
        pieces: list[tuple[Tensor | None, int, int, float]] = [(source, 70, 70, scale), (source[:3], 3, 70, 1.0)]
        assert gathered(pieces, out, torch.float32) == flag, (value, scale, target)


def check_whole_adapters(device: str) -> None:
    """Stacks of adapters of several dtypes and ranks that lack modules, with and without weights, as torch makes them."""
    generator = torch.Generator().manual_seed(2)

    def adapter(name: str, rank: int, dtype: torch.dtype, *modules: int) -> Adapter:
        def factors(index: int) -> LoraFactors:
            a = torch.randn(rank + index, 20, generator=generator).to(dtype)
            b = torch.randn(12, 2 * (rank + index), generator=generator)[:, : rank + index]
            return LoraFactors(a, b, 0.5 + index)

        other = LoraFactors(torch.randn(rank, 7, generator=generator), torch.randn(31, rank, generator=generator), 3.0)
        return Adapter(name, {**{f"layers.{index}.up": factors(index) for index in modules}, "layers.0.down": other})

    cpu = torch.device("cpu")
    adapters = [
        adapter("a", 3, torch.float16, 0, 1, 2),
        adapter("b", 2, torch.float32, 1),
        adapter("c", 5, torch.bfloat16, 0, 2),
    ]
    groups = group_modules(adapters)
    arrangement = arranged(tuple(groups))
    assert [len(group.modules) for group in groups] == [1, 3]
    weights = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    alike = weights[:1]
    moved = [map_factors(a, lambda f: LoraFactors(f.A.to(device), f.B.to(device), f.scaling)) for a in adapters]
    for given, factors_of_b in ((None, torch.ones(4, 3)), (weights, weights), (alike, alike.expand(4, 3))):
        memory = torch.full((arrangement.size,), 7.0, device=device)
        sources = Sources(torch.device(device), 0)
        assert not gather_stacks(arrangement, memory, moved, sources, given)
        for index, (group, factor) in enumerate(zip(groups, factors_of_b.split([1, 3]), strict=True)):
            expected = stack_group(group, adapters, cpu)
            a, b = arrangement.stack(memory, index)
            columns = [factor[:, i, None].expand(-1, slot.stop - slot.start) for i, slot in enumerate(group.slots)]
            assert torch.equal(a.cpu(), expected.A)
            torch.testing.assert_close(b.cpu(), expected.B * torch.cat(columns, 1)[:, None, :].float())


test_in_tritons_interpreter, test_on_a_gpu = both_ways("tests.kernels.test_gather", globals())


if __name__ == "__main__":
    run_all(globals())
