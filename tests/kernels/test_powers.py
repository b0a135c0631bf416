# SPDX-License-Identifier: Apache-2.0
"""Powers of M = Σ_i M_i V Vᵀ M_iᵀ times a few columns in one kernel, against products of matrices by torch."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from tests.kernels.running import both_ways, run_all
from vllm_merge.algebra import tucker
from vllm_merge.algebra.subspace import WAYS

# Tasks, terms of each, rows, columns, columns that are multiplied.
CASES = {
    "cpu": ((2, 3, 6, 5, 2), (3, 16, 48, 20, 16), (2, 1, 3, 1, 2), (4, 5, 20, 20, 3), (5, 2, 7, 10, 17)),
    "cuda": (
        (2, 3, 6, 5, 2),
        (8, 16, 128, 128, 16),
        (4, 32, 128, 128, 32),
        (8, 16, 128, 100, 7),
        (5, 24, 120, 120, 24),
    ),
}
CASES["cuda"] += CASES["cpu"]


def given_of(tasks: int, width: int, rows: int, cols: int, wide: int) -> list[Tensor]:
    """Factors of three modules, the second of copies of one task with a term of zeros, the third so small that its powers vanish."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((tasks * width, rows), (tasks * width, cols), (cols, wide), (rows, wide))
    out, into, far, near = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in shapes)
    for side in (out, into):
        side[1] = side[1, :width].repeat(tasks, 1)
        side[1, -1] = 0
        side[2] *= 1e-40
    out[2, 0, 0], into[2, 0, 0] = 5e-324, -0.0
    near[:, -1] = near[:, 0]
    near[1, :, -1] = 0
    return [out, into, far, near]


def expected_of(out: Tensor, into: Tensor, far: Tensor, near: Tensor, width: int, times: int) -> tuple[Tensor, Tensor]:
    changes = [o.mT @ i for o, i in zip(out.split(width, dim=1), into.split(width, dim=1), strict=True)]
    columns = torch.cat([change @ far for change in changes], dim=2)
    for _ in range(times):
        near = columns @ (columns.mT @ near)
    return near, columns @ (columns.mT @ near)


def powers_of(given: Sequence[Tensor], width: int, times: int, device: str) -> tuple[Tensor, Tensor]:
    """By the kernel, in memory of nan; and what it is given is not changed."""
    from vllm_merge.kernels.powers import Powers

    out, into, far, near = before = [part.to(device).contiguous() for part in given]
    after = [part.clone() for part in before]
    with patch.object(Tensor, "new_empty", lambda like, *shape: like.new_full(shape, torch.nan)):
        call = Powers(out, into, width, near.shape[2], times)
    call(torch.zeros_like(far), torch.ones_like(near))  # of which nothing may be left
    found = call(far, near)
    torch.testing.assert_close(before, after, rtol=0, atol=0, equal_nan=True)
    return found


def check_powers_are_those_of_the_matrix(device: str) -> None:
    from vllm_merge.kernels.powers import fits

    for case in CASES[device]:
        given = given_of(*case)
        assert fits(*case)
        for times in (1, 2, 6):
            found = powers_of(given, case[1], times, device)
            for one, other in zip(found, expected_of(*given, case[1], times), strict=True):
                size = other.abs().amax((1, 2), keepdim=True)
                assert ((one.cpu() - other).abs() <= 1e-12 * size + 1e-300).all()
                assert (one[1, :, -1] == 0).all()
                assert (size[:2] > 0).all()


def check_what_lies_beside_the_matrices_is_not_read_or_written(device: str) -> None:
    """Some modules of a batch whose others are nan, and memory of nan wherever nothing is written."""
    case = CASES[device][0]
    given = given_of(*case)
    poisoned = [torch.full((3, *part.shape[1:]), torch.nan, dtype=part.dtype, device=device) for part in given]
    for part, other in zip(given, poisoned, strict=True):
        other[1] = part[0]
    found = powers_of([part[1:2] for part in poisoned], case[1], 3, device)
    for one, other in zip(found, expected_of(*(part[:1] for part in given), case[1], 3), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-12, atol=0)
    every = powers_of(poisoned, case[1], 3, device)
    assert torch.equal(every[0][1], found[0][0])
    assert torch.equal(every[1][1], found[1][0])
    assert every[0][[0, 2]].isnan().all()


def check_what_does_not_fit_is_said(device: str) -> None:
    from vllm_merge.kernels.powers import fits

    assert fits(8, 16, 128, 128, 16)
    assert fits(4, 32, 128, 128, 32)
    assert not fits(8, 17, 128, 128, 16)
    assert not fits(8, 16, 129, 128, 16)
    assert not fits(8, 16, 128, 129, 16)
    assert not fits(8, 16, 128, 128, 17)
    assert not fits(2, 33, 128, 128, 16)
    assert not fits(2, 16, 128, 128, 33)


def check_iterations_are_those_of_products(device: str) -> None:
    """Of Tucker-2: subspaces, and what is measured of them; the columns of one side are fewer than its terms."""
    tasks, width, rows, cols, wide = CASES[device][0] if device == "cpu" else CASES[device][1]
    out, into, far, near = given_of(tasks, width, rows, cols, wide)
    ranks = torch.full((2,), wide)
    start = tucker._Tasks(out[:2], into[:2], torch.ones(()), width, ranks)
    path, _, _ = tucker._walk(start, near[:2], far[:2], 40, ())
    near, far = path.u[-1], path.v[-1]
    found = []
    for on in ("cpu", device):
        sides = [side[:2].to(on).contiguous() for side in (out, into)]
        batch = tucker._Tasks(*sides, torch.ones((), device=on), width, ranks.to(on))
        with patch.object(tucker, "_on_a_gpu", lambda _, kernel=bool(found): kernel):
            assert (batch.follower(wide, WAYS[0]) is not None) == bool(found)
            assert batch.follower(wide, WAYS[1]) is None
            path, kept, settled = tucker._walk(batch, near.to(on), far.to(on), 3, WAYS)
        found.append((path.u.cpu(), path.v.cpu(), kept, settled))
    (u, v, kept, settled), (of_u, of_v, of_kept, of_settled) = found
    for one, other in ((u, of_u), (v, of_v)):
        torch.testing.assert_close(one @ one.mT, other @ other.mT, rtol=0, atol=1e-9)
    torch.testing.assert_close(kept, of_kept, rtol=1e-12, atol=0)
    assert settled == of_settled >= 1


test_in_tritons_interpreter, test_on_a_gpu = both_ways("tests.kernels.test_powers", globals())


if __name__ == "__main__":
    run_all(globals())
