# SPDX-License-Identifier: Apache-2.0
"""A step of `methods.do_orthogonalize`'s Adam on a GPU: all that it does entry by entry, each array read and written once.

An entry has five numbers to read and three to write, of which the step is as long as that takes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # entries of a program


@triton.jit(do_not_specialize=["step", "blocks"])  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]
    moved, mean, square, slope, start, rates, numbers, step, entries, blocks, BLOCK: tl.constexpr
):
    """numbers: those of every step, in float64, which numbers among the arguments are not."""
    program = tl.program_id(0).to(tl.int64)
    module = program // blocks
    inner = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = inner < entries
    place = module * entries + inner
    numbers += 7 * step
    p = tl.load(moved + place, mask=inside, other=0.0)
    m = tl.load(mean + place, mask=inside, other=0.0)
    v = tl.load(square + place, mask=inside, other=0.0)
    g = tl.load(slope + place, mask=inside, other=0.0)
    g += tl.load(numbers) * (p - tl.load(start + place, mask=inside, other=0.0).to(tl.float64))
    m += tl.load(numbers + 1) * (g - m)
    v = tl.load(numbers + 2) * v + tl.load(numbers + 3) * g * g
    unbiased = tl.sqrt(v / tl.load(numbers + 4)) + tl.load(numbers + 5)
    p -= tl.load(rates + module) / tl.load(numbers + 6) * m / unbiased
    tl.store(moved + place, p, mask=inside)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)


def stepped(
    moved: Tensor, mean: Tensor, square: Tensor, slope: Tensor, start: Tensor, rates: Tensor, numbers: Tensor, step: int
) -> None:
    """Step number `step`, from 0, of moved, mean and square (modules, K, d) float64, which are changed.

    slope: the gradient without that of γ ‖moved − start‖², float64. start: float32. rates: (modules,) float64. numbers:
    (steps, 7) float64, see `methods.do_orthogonalize`. All are contiguous.
    """
    entries = moved[0].numel()
    blocks = triton.cdiv(entries, _BLOCK)
    _step[(len(moved) * blocks,)](
        moved, mean, square, slope, start, rates, numbers, step, entries, blocks, BLOCK=_BLOCK, num_warps=4
    )
