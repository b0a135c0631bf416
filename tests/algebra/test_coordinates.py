# SPDX-License-Identifier: Apache-2.0
"""Every space represents the tasks without loss, whatever their scale."""

from __future__ import annotations

import pytest
import torch

from tests.adapters_in_memory import distance, random_adapter, three
from vllm_merge import Adapter, LoraFactors, merge
from vllm_merge.adapters.stacking import group_modules, stack_group
from vllm_merge.algebra import bases, symmetric
from vllm_merge.algebra import coordinates as coordinates_module
from vllm_merge.algebra.coordinates import Coordinates, Grams, coordinates

EVERYTHING = slice(None)


def all_coordinates(adapters: list[Adapter], space: str) -> list[tuple[Coordinates, torch.Tensor, torch.Tensor]]:
    found = []
    for group in group_modules(adapters):
        stack = stack_group(group, adapters, torch.device("cpu"))
        found.append((coordinates(space, stack, Grams.of(stack), singular=True), stack.A.double(), stack.B.double()))
    return found


def worst_error(adapters: list[Adapter], space: str) -> float:
    """Largest ‖ΔW_i from its coordinates − ΔW_i‖ / ‖ΔW_i‖ over adapters and modules."""
    worst = 0.0
    for space_coordinates, a, b in all_coordinates(adapters, space):
        values = space_coordinates.values(EVERYTHING, EVERYTHING, EVERYTHING).double()
        for m, module in enumerate(space_coordinates.group.modules):
            for i, adapter in enumerate(adapters):
                x = values[m, i]
                if space_coordinates.left_transform is not None:
                    x = b[m] @ space_coordinates.left_transform[m] @ x
                if space_coordinates.right_transform is not None:
                    x = x @ (a[m].mT @ space_coordinates.right_transform[m]).mT
                if module in adapter.factors:
                    target = adapter.factors[module].delta().double()
                    worst = max(worst, float((x - target).norm() / target.norm()))
                else:
                    assert not x.any()
    return worst


def tiny_b_huge_a() -> Adapter:
    x = random_adapter("skewed", 3, 7)
    return Adapter("skewed", {m: LoraFactors(f.A * 1e6, f.B * 1e-6) for m, f in x.factors.items()})


def partial() -> list[Adapter]:
    x, y, z = three()
    return [x, Adapter("y", {m: f for m, f in y.factors.items() if "layers.0" in m}), z]


CASES = {
    "mixed ranks": three(),
    "missing modules": partial(),
    "norms apart by 1e4": [random_adapter("s", 4, 1, size=1e-4), random_adapter("l", 4, 2)],
    "tiny": [random_adapter("s", 4, 1, size=3e-5), random_adapter("t", 2, 2, size=2e-5)],
    "tiny B, huge A": [tiny_b_huge_a(), random_adapter("x", 4, 1)],
    "more ranks than dimensions": [random_adapter(str(seed), 10, seed) for seed in range(4)],
    "copies": [random_adapter("x", 4, 1), random_adapter("x", 4, 1)],
}


@pytest.mark.parametrize("space", ["delta", "knots", "core"])
@pytest.mark.parametrize("case", CASES)
def test_lossless(space: str, case: str) -> None:
    assert worst_error(CASES[case], space) < 3e-6


def test_knots_support_of_copies() -> None:
    x = random_adapter("x", 4, 1)
    for found, _, _ in all_coordinates([x, x], "knots"):
        assert found.shape[2] == 4
        assert found.entries.tolist() == [4 * found.group.shape[1]] * 2


def opposite() -> Adapter:
    return Adapter("opposite", {m: LoraFactors(f.A, -f.B, f.scaling) for m, f in three()[0].factors.items()})


def take_another_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors have no sign: another solver gives others, and rounds otherwise."""
    generator, solve = torch.Generator().manual_seed(0), symmetric.descending_eigh

    def other(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = solve(matrices * (1 + 1e-15))
        flips = torch.randint(2, (len(vectors), 1, vectors.shape[2]), generator=generator, dtype=vectors.dtype)
        return values, vectors * (2 * flips - 1)

    for module in (coordinates_module, bases):
        monkeypatch.setattr(module, "descending_eigh", other)


@pytest.mark.parametrize("space", ["knots", "core"])
@pytest.mark.parametrize("case", ["mixed ranks", "missing modules", "copies", "opposite"])
def test_directions_are_not_the_solvers_choice(space: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = [*three(), opposite()] if case == "opposite" else CASES[case]
    expected = all_coordinates(adapters, space)
    take_another_solver(monkeypatch)
    for (found, _, _), (before, _, _) in zip(all_coordinates(adapters, space), expected, strict=True):
        for part in ("left", "right", "left_transform", "right_transform"):
            one, two = getattr(found, part), getattr(before, part)
            assert one is two is None or torch.allclose(one, two, rtol=1e-4, atol=1e-5), part


@pytest.mark.parametrize("space", ["knots", "core"])
def test_sums_that_cancel_do_not_tell_of_the_solver(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x and −x: every entry takes the sign that most sums have, which is one of the coordinates."""
    adapters = [three()[0], opposite()]
    expected = merge(adapters, merge_method="ties", space=space, rank="lossless")
    assert all(expected.delta(module).norm() > 0.1 for module in expected.factors)
    for _ in range(3):
        take_another_solver(monkeypatch)
        assert distance(merge(adapters, merge_method="ties", space=space, rank="lossless"), expected) < 1e-5


def test_knots_rows_are_the_singular_directions() -> None:
    adapters = three()
    for found, _, b in all_coordinates(adapters, "knots"):
        assert found.left_transform is not None
        u = b @ found.left_transform
        assert torch.allclose(u.mT @ u, torch.eye(u.shape[2], dtype=torch.float64).expand_as(u.mT @ u), atol=1e-10)
        values = found.values(EVERYTHING, EVERYTHING, EVERYTHING).double()
        lengths = values.square().sum((1, 3)).sqrt()
        for m, module in enumerate(found.group.modules):
            side_by_side = torch.cat([adapter.factors[module].delta().double() for adapter in adapters], dim=1)
            expected = torch.linalg.svdvals(side_by_side)[: lengths.shape[1]]
            assert torch.allclose(lengths[m], expected, rtol=1e-4)


def test_two_bases_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes them, where both have one shape and full rank; the caller makes each by itself where they have not."""
    generator = torch.Generator().manual_seed(6)
    left, right = (torch.randn(3, d, 4, generator=generator, dtype=torch.float64) for d in (9, 7))
    grams = left.mT @ left, right.mT @ right
    assert bases.bases_at_once(grams, (4, 4)) is None, "a CPU does not wait for launches"
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = bases.bases_at_once(grams, (4, 4))
    assert found is not None
    for x, gram, one in zip((left, right), grams, found, strict=True):
        alone = bases.orthonormal_basis(gram, 4)
        assert torch.equal(one.T, alone.T)
        assert torch.equal(one.R, alone.R)
        assert one.rank.tolist() == [4, 4, 4]
        q = x @ one.T
        torch.testing.assert_close(q.mT @ q, torch.eye(4, dtype=q.dtype).expand(3, 4, 4))
        torch.testing.assert_close(q @ one.R, x)
    assert bases.bases_at_once((grams[0], grams[1][:2]), (4, 4)) is None
    assert bases.bases_at_once((grams[0], torch.ones_like(grams[1])), (4, 4)) is None, "of rank 1"
