# SPDX-License-Identifier: Apache-2.0
"""TSV-M, Iso-C and Iso-CTS against plain dense versions of their definitions, and how they share out directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three
from vllm_merge import Adapter, merge
from vllm_merge.methods.iso_cts import split
from vllm_merge.methods.tsv_m import kept_ranks

WEIGHTS = [0.5, 2.0, -0.7]


def support(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-6 * s[0]).sum())
    return u[:, :rank], s[:rank], vt[:rank].mT


def polar(matrix: Tensor) -> Tensor:
    u, _, v = support(matrix)
    return u @ v.mT


def tasks(module: str) -> list[Tensor]:
    return [w * deltas(adapter)[module] for w, adapter in zip(WEIGHTS, three(), strict=True)]


def tsv_m(module: str) -> Tensor:
    parts = [support(task) for task in tasks(module)]
    u, s, v = (torch.cat(columns, -1) for columns in zip(*parts, strict=True))
    return polar(u) * s @ polar(v).mT


def iso_c(module: str) -> Tensor:
    u, s, v = support(sum(tasks(module), torch.zeros(())))
    return s.mean() * u @ v.mT


def iso_cts(module: str) -> Tensor:
    """Ranks 3, 5, 2: R = 10, 8 common directions without a share; (10 − 8) / 3 rounds to 1 for each task, 7 common."""
    u, s, v = support(sum(tasks(module), torch.zeros(())))
    us, ss, vs = [u[:, :7]], [s[:7]], [v[:, :7]]
    for task in tasks(module):
        left, strengths, right = support(task - us[0] @ us[0].mT @ task)
        us.append(left[:, :1]), ss.append(strengths[:1]), vs.append(right[:, :1])
    return torch.cat(ss).mean() * polar(torch.cat(us, 1)) @ polar(torch.cat(vs, 1)).mT


@pytest.mark.parametrize("reference", [tsv_m, iso_c, iso_cts])
def test_definition(reference: object) -> None:
    method = reference.__name__  # type: ignore[attr-defined]
    merged = merge(three(), merge_method=method, weights=WEIGHTS, parameters={"lambda": 0.5}, rank="lossless")
    assert distance(merged, {module: 0.5 * reference(module) for module in SHAPES}) < 1e-6  # type: ignore[operator]


def test_the_spectrum_of_iso_is_flat() -> None:
    for method in ("iso_c", "iso_cts"):
        merged = merge(three(), merge_method=method, rank="lossless")
        for module in SHAPES:
            strengths = torch.linalg.svdvals(merged.delta(module).double())[:10]
            assert float(strengths.min() / strengths.max()) > 0.999 if method == "iso_c" else float(strengths[9]) > 0


def test_tsv_m_shares_out_the_room() -> None:
    """Σ r_i = 40 > 24 = min(d): each of four tasks keeps 6 of its 10 triples."""
    many = [random_adapter(str(seed), 10, seed) for seed in range(4)]
    cut = [Adapter(a.name, merge([a], merge_method="linear", rank=6).factors) for a in many]
    whole = merge(many, merge_method="tsv_m", rank="lossless")
    assert distance(whole, merge(cut, merge_method="tsv_m", rank="lossless")) < 1e-5
    assert set(whole.report.ranks.values()) == {24}


@pytest.mark.parametrize(
    ("ranks", "room", "fraction", "expected"),
    [
        ([16, 16, 16], 48, 0.8, (39, 3)),
        ([8] * 6, 32, 0.8, (26, 1)),
        ([8] * 6, 24, 0.8, (18, 1)),
        ([4, 4], 64, 1.0, (8, 0)),
        ([4, 4], 64, 0.0, (0, 4)),
        ([4, 0, 4], 64, 0.5, (4, 2)),  # an adapter that lacks the module needs no room
        ([1, 1, 1], 2, 0.0, (2, 0)),
        ([2, 3], 64, 0.5, (1, 2)),  # 3 / 2 is rounded to even
    ],
)
def test_split_of_iso_cts(ranks: list[int], room: int, fraction: float, expected: tuple[int, int]) -> None:
    common, of_each = split(torch.tensor([ranks]), room, fraction)
    assert (int(common), int(of_each)) == expected


@pytest.mark.parametrize(
    ("ranks", "room", "expected"),
    [
        ([4, 8, 2], 14, [4, 8, 2]),
        ([8] * 6, 32, [5] * 6),
        ([8, 2, 8], 16, [5, 2, 5]),
        ([8, 0, 8], 12, [6, 0, 6]),  # an adapter that lacks the module needs no room
        ([1] * 32, 16, [1] * 32),
    ],
)
def test_kept_ranks_of_tsv_m(ranks: list[int], room: int, expected: list[int]) -> None:
    assert kept_ranks(torch.tensor([ranks]), room).tolist() == [expected]
