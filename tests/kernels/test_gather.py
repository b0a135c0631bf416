# SPDX-License-Identifier: Apache-2.0
"""The gathering kernel against plain copies: padding, scales, strides, dtypes, and the flag of what does not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import map_factors
from tests.kernels.running import checks_of, interpret, on_a_gpu, run_all
from vllm_merge import Adapter, LoraFactors
from vllm_merge.adapters.stacking import Sources, fill_on_gpu, group_modules, stack_group

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def gathered(pieces: list[tuple[Tensor | None, int, int, float]], out: Tensor, dtype: torch.dtype) -> int:
    """Write each (source, rows, columns, scale) to out[i], from row 1, column 2 on. Returns the flag."""
    from vllm_merge.kernels.gather import gather

    count, height, width = out.shape
    numbers: list[int] = []
    for index, (source, rows, columns, _) in enumerate(pieces):
        place = index * height * width + width + 2
        given = (0, 0, 0, 0) if source is None else (source.data_ptr(), *source.shape, source.stride(0))
        numbers += [*given, rows, columns, place]
    table = torch.tensor([*numbers, width], device=out.device)
    scales = torch.tensor([scale for *_, scale in pieces], device=out.device)
    overflow = torch.zeros(1, dtype=torch.int32, device=out.device)
    assert len(pieces) == count
    gather(table, scales, out, overflow, max(rows * columns for _, rows, columns, _ in pieces), dtype)
    return int(overflow)


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
            rounding = 2**-7 if (device, target) == ("cpu", torch.bfloat16) else 0.0  # the interpreter cuts off
            torch.testing.assert_close(out, expected, rtol=rounding, atol=0.0)


def check_random_shapes(device: str) -> None:
    """Every stack of random adapters, as `fill_on_gpu` would place it."""
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
        assert gathered(pieces, out, torch.float32) == 0
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

        return Adapter(name, {f"layers.{index}.up": factors(index) for index in modules})

    cpu = torch.device("cpu")
    adapters = [
        adapter("a", 3, torch.float16, 0, 1, 2),
        adapter("b", 2, torch.float32, 1),
        adapter("c", 5, torch.bfloat16, 0, 2),
    ]
    (group,) = group_modules(adapters)
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    moved = [map_factors(a, lambda f: LoraFactors(f.A.to(device), f.B.to(device), f.scaling)) for a in adapters]
    for given, factor in ((None, torch.ones(3, 3)), (weights, weights)):
        expected = stack_group(group, adapters, cpu)
        a = torch.full_like(expected.A, 7.0, device=device)
        b = torch.full_like(expected.B, 7.0, device=device)
        sources = Sources(torch.device(device), 0)
        assert int(fill_on_gpu(group, moved, sources, a, b, None if given is None else given.numpy())) == 0
        columns = [factor[:, i, None].expand(-1, slot.stop - slot.start) for i, slot in enumerate(group.slots)]
        assert torch.equal(a.cpu(), expected.A)
        torch.testing.assert_close(b.cpu(), expected.B * torch.cat(columns, 1)[:, None, :].float())


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("check", checks_of(globals()))
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


def test_in_tritons_interpreter() -> None:
    interpret("tests.kernels.test_gather", globals())


if __name__ == "__main__":
    run_all(globals())
