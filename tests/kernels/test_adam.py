# SPDX-License-Identifier: Apache-2.0
"""Adam's step in one kernel, against the same step by torch alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.running import both_ways, run_all
from vllm_merge.methods.do_orthogonalize import _numbers, _step_by_torch

SHAPES = ((1, 1, 3), (3, 5, 7), (2, 16, 64), (5, 12, 171))
STEPS = 4
GUARD = 64  # entries on either side that nobody may write to


def guarded(values: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Memory of nan, and a copy of the values in the middle of it."""
    memory = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype, device=device)
    inner = memory[GUARD:-GUARD].view(values.shape)
    inner.copy_(values)
    return memory, inner


def slopes_of(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gradients of many sizes: tied, zero, so small that their squares vanish, and denormal."""
    slope = torch.randn(shape, generator=generator, dtype=torch.float64)
    slope *= 10.0 ** torch.randint(-12, 4, shape, generator=generator)
    kinds = torch.randint(0, 8, shape, generator=generator)
    for kind, value in ((0, 0.0), (1, 1e-8), (2, -1e-200), (3, 5e-324)):
        slope[kinds == kind] = value
    return slope


def check_the_steps_are_torchs(device: str) -> None:
    from vllm_merge.kernels import adam

    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES:
        for gamma in (0.0, 0.7):
            start = torch.randn(shape, generator=generator)
            start[..., 0] = 1e-42
            start[:, 0] = start[:, -1]
            rates = torch.rand(shape[0], generator=generator, dtype=torch.float64)
            rates[-1] = 0
            numbers = _numbers(STEPS, gamma)
            expected = [start.double(), *(torch.zeros(shape, dtype=torch.float64) for _ in range(2))]
            memories, found = zip(*(guarded(values, device) for values in expected), strict=True)
            fixed = [guarded(values, device)[1] for values in (start, rates, numbers)]
            for step in range(STEPS):
                slope = slopes_of(shape, generator)
                adam.stepped(*found, guarded(slope, device)[1], *fixed, step)
                _step_by_torch(*expected, slope, start, rates, numbers, step)
            for memory, mine, right in zip(memories, found, expected, strict=True):
                torch.testing.assert_close(mine.cpu(), right, rtol=1e-9, atol=1e-300)
                assert memory[:GUARD].isnan().all()
                assert memory[-GUARD:].isnan().all()
            assert torch.equal(found[0][-1].cpu(), start[-1].double())  # at a rate of 0
            assert not torch.equal(found[1].cpu(), torch.zeros(shape, dtype=torch.float64))


def check_numbers_are_those_of_float64(device: str) -> None:
    """A gradient of which float32's 0.1, 0.001 and 1e-8 would make something else, in the eighth digit."""
    from vllm_merge.kernels import adam

    start, slope = torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3e-8, dtype=torch.float64)
    moved, mean, square = (torch.zeros(1, 1, 1, dtype=torch.float64, device=device) for _ in range(3))
    rates = torch.ones(1, dtype=torch.float64)
    given = (part.to(device) for part in (slope, start, rates, _numbers(1, 0.0)))
    adam.stepped(moved, mean, square, *given, 0)
    assert abs(float(mean) / 3e-9 - 1) < 1e-14
    assert abs(float(square) / 9e-19 - 1) < 1e-12  # as exact as 1 − 0.999 is
    assert abs(float(moved) / (-3e-8 / (3e-8 + 1e-8)) - 1) < 1e-12


def check_what_is_not_finite_stays_so(device: str) -> None:
    from vllm_merge.kernels import adam

    start, slope = torch.ones(2, 2, 3), torch.ones(2, 2, 3, dtype=torch.float64)
    slope[0, 1, 2], slope[1, 0, 0] = torch.nan, torch.inf
    moved = start.double().to(device)
    mean, square = torch.zeros_like(moved), torch.zeros_like(moved)
    rates = torch.ones(2, dtype=torch.float64)
    given = (part.to(device) for part in (slope, start, rates, _numbers(1, 1.0)))
    adam.stepped(moved, mean, square, *given, 0)
    assert torch.equal(moved.cpu().isfinite(), slope.isfinite())


test_in_tritons_interpreter, test_on_a_gpu = both_ways("tests.kernels.test_adam", globals())


if __name__ == "__main__":
    run_all(globals())
