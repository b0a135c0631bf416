# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: vLLM stacks a layer's experts, so it takes a pair of factors of every one, of one rank by projection.

A merge may have none where an adapter has none, and another rank at every module. What is missing is ΔW = 0, and a lower rank
is filled up with zeros: neither changes the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.functional import pad

Pair = tuple[Tensor, Tensor]

DOWN = 1  # the place of the projection back to the hidden size: gate, down, up; or up, down where there is no gate


def projections(parts: Sequence[str]) -> int:
    """How many projections an expert has. parts: the modules of a layer's experts, expert by expert."""
    return len({part.rpartition(".")[2] for part in parts})


def whole_experts(parts: Sequence[str], pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """{module: (A (r, d_in), B (d_out, r))} of all parts of a layer, r the same for each projection; {} if it has none."""
    given = {index: pairs[part] for index, part in enumerate(parts) if part in pairs}
    if not given:
        return {}
    count = projections(parts)
    first, (a, b) = next(iter(given.items()))
    inner_to_hidden = (a.shape[1], b.shape[0]) if first % count == DOWN else (b.shape[0], a.shape[1])
    found: dict[str, Pair] = {}
    for index, part in enumerate(parts):
        rank = max((pair[0].shape[0] for i, pair in given.items() if i % count == index % count), default=1)
        d_in, d_out = inner_to_hidden if index % count == DOWN else inner_to_hidden[::-1]
        mine_a, mine_b = given.get(index, (a.new_zeros(rank, d_in), b.new_zeros(d_out, rank)))
        short = rank - mine_a.shape[0]
        found[part] = (pad(mine_a, (0, 0, 0, short)), pad(mine_b, (0, short))) if short else (mine_a, mine_b)
    return found
