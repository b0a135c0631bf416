# SPDX-License-Identifier: Apache-2.0
"""Exact order statistics of magnitudes over tiles that are never all in memory: radix selection on float32 bits.

The bit pattern of a non-negative float32 orders like the number. Each pass counts one digit of the patterns that agree
with the digits found so far, from the most significant one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vllm_merge.algebra.tiles import TilePasses

_FEW = 64
_SIGNLESS_BITS = 31


def kth_largest(tiles: Callable[[], Iterable[tuple[Tensor, slice]]], counts: Tensor) -> Tensor:
    """The counts-th largest |x|, exactly, in the shape of counts, float32.

    counts: (all modules, n) int64 selects within every module and task, (1, n) within every task over all modules.
    tiles() starts a pass over pairs of values (modules, n, rows, cols) and the positions of their modules. Entries that
    no tile has count as zeros: a count beyond the number of entries gives 0.
    """
    few = counts.numel() <= _FEW
    prefix = torch.zeros_like(counts, dtype=torch.int32)
    remaining = counts.clone()
    low = _SIGNLESS_BITS
    for width in (16, 15) if few else (11, 10, 10):
        low -= width
        histogram = torch.zeros(*counts.shape, 1 << width, dtype=torch.int64, device=counts.device)
        for values, modules in tiles():
            where = modules if counts.shape[0] > 1 else slice(0, 1)
            histogram[where].add_(_digit_counts(values, prefix[where], low, width))
        from_top = histogram.flip(-1).cumsum(-1)
        above = (from_top < remaining[..., None]).sum(-1).clamp_max((1 << width) - 1)
        before = from_top.gather(-1, (above - 1).clamp_min(0)[..., None])[..., 0]
        remaining = remaining - torch.where(above > 0, before, 0)
        prefix = (prefix << width) | ((1 << width) - 1 - above).int()
    return prefix.view(torch.float32)


def _digit_counts(values: Tensor, prefix: Tensor, low: int, width: int) -> Tensor:
    """How often each digit occurs among the entries whose higher digits are the prefix; (owners, n, 2^width) int64."""
    owners = torch.arange(prefix.numel(), dtype=torch.int32, device=values.device).view_as(prefix) << width
    bits = values.float().abs().view(torch.int32)
    if low + width == _SIGNLESS_BITS:
        keys = (bits >> low).bitwise_or_(owners[..., None, None])
    else:
        matching = (bits >> (low + width)) == prefix[..., None, None]
        found = matching.view(-1).nonzero()[:, 0]
        owner = owners.expand(bits.shape[:2]).flatten()[found // (bits.shape[2] * bits.shape[3])]
        keys = ((bits.view(-1)[found] >> low) & ((1 << width) - 1)) | owner
    return torch.bincount(keys.flatten(), minlength=prefix.numel() << width).view(*prefix.shape, -1)


def kth_largest_of(passes: TilePasses, counts: Tensor) -> Tensor:
    """`kth_largest` of the entries of all tiles, by the GPU's kernels where they are made on the fly.

    counts: (…, all modules, n) or (…, 1, n), several times what `kth_largest` takes; all are found together.
    """
    if passes.on_the_fly:
        from vllm_merge.kernels import selection

        return selection.kth_largest(lambda: (tile.products() for tile in passes.tiles()), counts)
    several = counts.reshape(-1, *counts.shape[-2:])
    found = [kth_largest(lambda: ((tile.values, tile.modules) for tile in passes.tiles()), one) for one in several]
    return torch.stack(found).view(counts.shape)
