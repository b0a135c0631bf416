# SPDX-License-Identifier: Apache-2.0
"""The kernels over products that are never stored, against the plain torch code that stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.kernels.running import checks_of, interpret, on_a_gpu, run_all
from vllm_merge.algebra.masks import keep_mask, mask_limits
from vllm_merge.algebra.selection import kth_largest
from vllm_merge.methods.consensus import consensus
from vllm_merge.methods.factor_sides import Side
from vllm_merge.methods.factor_ties import elected
from vllm_merge.methods.ties import disjoint_merge

SLOTS = (slice(0, 4), slice(4, 5), slice(5, 12))
SHAPES = ((2, 70, 90), (1, 30, 130))  # (modules, rows, columns) of two batches


def factors(device: str, seed: int, kind: str) -> list[tuple[Tensor, Tensor]]:
    """(left, right) of each batch; all but `random` ones are whole numbers, or such times a power of 2, whose
    products are exact in any order, and full of ties but for `many`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for modules, rows, columns in SHAPES:
        left = torch.randn(modules, rows, 12, generator=generator)
        right = torch.randn(modules, columns, 12, generator=generator)
        if kind != "random":
            left, right = (2 * left).round(), (2 * right).round()
        if kind == "many":
            right = (1e4 * torch.randn(right.shape, generator=generator)).round()
        if kind == "denormal":
            left, right = left * 2.0**-70, right * 2.0**-74
        if kind == "sparse":
            left[:, 5:] = 0
        found.append((left.to(device), right.to(device).mT))  # the right one lies transposed
    return found


def batches(given: list[tuple[Tensor, Tensor]]) -> Callable[[], Iterator[object]]:
    """A pass over the batches for the kernels."""
    from vllm_merge.kernels.products import Products

    def passes() -> Iterator[object]:
        start = 0
        for left, right in given:
            yield Products(left, right, SLOTS, slice(start, start + len(left)))
            start += len(left)

    return passes


def stored(given: list[tuple[Tensor, Tensor]]) -> Callable[[], Iterator[tuple[Tensor, slice]]]:
    """The same pass with every product made, (modules, n, rows, columns)."""

    def tiles() -> Iterator[tuple[Tensor, slice]]:
        start = 0
        for left, right in given:
            values = torch.stack([left[:, :, slot] @ right[:, slot] for slot in SLOTS], dim=1)
            yield values, slice(start, start + len(left))
            start += len(left)

    return tiles


def check_kth_largest_by_digits(device: str) -> None:
    """Within every module, and over all; the first, the last, one beyond the last, and between ties."""
    from vllm_merge.kernels import selection

    entries = torch.tensor([[6300], [6300], [3900]])
    for kind in ("whole", "denormal", "sparse", "random"):
        given = factors(device, 1, kind)
        everywhere, by_module = torch.tensor([[1, 16500, 8000]]), entries + torch.tensor([[0, 1, -6]])
        inside = [torch.tensor([[100, 2000, 5]]), torch.tensor([[100, 200, 1], [5, 3000, 6300], [2500, 3900, 1]])]
        for counts in (everywhere, by_module, *(inside if kind == "whole" else [])):
            found = selection.kth_largest(batches(given), counts.to(device)).cpu()
            expected = kth_largest(stored(given), counts.to(device)).cpu()
            # Entries near zero are what is left of terms near 1, which processors add in orders of their own.
            rounding = {"rtol": 1e-5, "atol": 1e-6} if kind == "random" else {"rtol": 0.0, "atol": 0.0}
            torch.testing.assert_close(found, expected, **rounding)


@contextmanager
def guessing_from(selection: object, samples: int, **more: int) -> Iterator[None]:
    """Small problems are guessed too, from few samples, with as many counters as that takes."""
    wanted = {"_FEW": 0, "_SAMPLES": samples, "_WIDEST": 20, **more}
    before = {name: getattr(selection, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(selection, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(selection, name, value)


EVERYWHERE = torch.tensor([[[6300, 6000, 7000]], [[3000, 7000, 8000]]])
BY_MODULE = torch.tensor([[[100, 200, 1], [5, 3000, 6300], [2500, 3900, 1]], [[6000, 1, 3], [7, 9, 6300], [1, 2, 3]]])
"""Two selections each, of the entries of `factors`."""


def check_kth_largest_by_guess(device: str) -> None:
    """A guess that succeeds is what is stored, to the bit; it does succeed, in one pass or in several."""
    from vllm_merge.kernels import selection

    given = factors(device, 2, "many")
    for counts, widest, passes in ((EVERYWHERE, 22, 1), (EVERYWHERE, 11, 2), (BY_MODULE, 16, 2), (BY_MODULE, 11, 3)):
        launched: list[int] = []
        with guessing_from(selection, 4096, _WIDEST=widest, _COUNTERS=1 << 29, _AT_ONCE=1 << widest):
            found = selection._kth_largest_by_guess(counting(batches(given), launched), counts.to(device))
        assert found is not None
        assert torch.equal(found, torch.stack([kth_largest(stored(given), one) for one in counts.to(device)]))
        assert len(launched) == 1 + passes, "one for the samples"


def check_a_guess_that_is_no_help(device: str) -> None:
    """It says so, and what is found is right all the same; so few entries are not worth one."""
    from vllm_merge.kernels import selection

    given = factors(device, 2, "many")
    for counts in (EVERYWHERE[1:].to(device), BY_MODULE[:1].to(device)):
        with guessing_from(selection, 32, _MARGIN=0):
            assert selection._kth_largest_by_guess(batches(given), counts) is None
            assert torch.equal(selection.kth_largest(batches(given), counts)[0], kth_largest(stored(given), counts[0]))
        with guessing_from(selection, 4096, _COUNTERS=2 * counts.numel() - 1):
            assert selection._kth_largest_by_guess(batches(given), counts) is None
        assert selection._kth_largest_by_guess(batches(given), counts) is None


def check_a_guess_of_strips(device: str) -> None:
    """Modules that come in several parts, of other sizes, are selected from as a whole."""
    from vllm_merge.kernels import selection
    from vllm_merge.kernels.products import Products

    given = factors(device, 9, "many")
    cuts = ((0, 64), (64, 90)), ((0, 16), (16, 130))

    def strips() -> Iterator[Products]:
        start = 0
        for (left, right), columns in zip(given, cuts, strict=True):
            for module in range(len(left)):
                one, position = slice(module, module + 1), slice(start + module, start + module + 1)
                for first, last in columns:
                    yield Products(left[one], right[one, :, first:last], SLOTS, position, (0, first))
            start += len(left)

    for counts in (EVERYWHERE.to(device), BY_MODULE.to(device)):
        with guessing_from(selection, 512, _COUNTERS=1 << 20):
            found = selection._kth_largest_by_guess(strips, counts)
        assert found is not None
        assert torch.equal(found, torch.stack([kth_largest(stored(given), one) for one in counts]))


def counting(passes: Callable[[], Iterator[object]], launched: list[int]) -> Callable[[], Iterator[object]]:
    """Note every pass."""

    def counted() -> Iterator[object]:
        launched.append(1)
        return passes()

    return counted


def check_a_guess_among_duplicates_and_zeros(device: str) -> None:
    """Ties at the threshold, thresholds of 0 and denormal ones."""
    from vllm_merge.kernels import selection

    guessed = 0
    ends = torch.tensor([[[6300, 6200, 10], [1, 6300, 3150], [3900, 3900, 100]]])  # the last, the first, and others
    for kind in ("whole", "sparse", "denormal"):
        given = factors(device, 3, kind)
        for counts, widest in ((torch.tensor([[[3000, 2000, 5000]], [[16500, 16000, 16501]]]), 20), (ends, 12)):
            with guessing_from(selection, 512, _WIDEST=widest):
                found = selection._kth_largest_by_guess(batches(given), counts.to(device))
            guessed += found is not None
            expected = torch.stack([kth_largest(stored(given), one).cpu() for one in counts.to(device)])
            assert found is None or torch.equal(found.cpu(), expected), kind
    assert guessed >= 4, "most guesses are taken"


def check_elect(device: str) -> None:
    """Mean and sum, weights of both signs and 0, and what it counts, as the plain rule does it."""
    from vllm_merge.kernels import products

    generator = torch.Generator().manual_seed(4)
    for (left, right), (values, modules) in zip(
        factors(device, 5, "random"), stored(factors(device, 5, "random"))(), strict=True
    ):
        count = len(left)
        threshold = torch.rand(count, 3, generator=generator).to(device)
        weight = torch.randn(count, 3, generator=generator).to(device)
        weight[0, 1] = 0
        kept = torch.where(values.abs() >= threshold[..., None, None], values, 0.0) * weight[..., None, None]
        total, magnitude = kept.sum(1), kept.abs().sum(1)
        counts = torch.stack([(magnitude > 0).sum((1, 2)), (total.abs() < magnitude).sum((1, 2))], dim=1)
        for mean in (True, False):
            given, rule = products.Products(left, right, SLOTS, modules), products.Rule(weight, least=threshold)
            found = products.elect(given, rule, mean=mean)
            expected = disjoint_merge(
                kept.clone(), total, magnitude, weight[..., None, None], mean, lambda: torch.ones(3)
            )
            off = ((found.merged - expected).abs() > 1e-4 * expected.abs().clamp_min(1)).sum()
            assert off <= 2, "rounding may decide otherwise about an entry at its threshold"
            assert (found.counts - counts).abs().max() <= 2
            assert not bool(found.undecided)
            alone = products.votes(given, rule)
            assert torch.equal(alone, found.votes)
            assert (alone - total.sign().sum((1, 2))).abs().max() <= 2


def check_elect_keeps_what_equals_the_threshold(device: str) -> None:
    """The threshold that kth_largest gives keeps that many entries of each task, and its ties, exactly."""
    from vllm_merge.kernels import products, selection

    given = factors(device, 6, "random")
    counts = torch.tensor([[1500, 16000, 400]], device=device)
    threshold = selection.kth_largest(batches(given), counts)
    for task in range(3):
        weight = torch.zeros(1, 3, device=device)
        weight[0, task] = 1
        kept = 0
        start = 0
        for left, right in given:
            found = products.elect(
                products.Products(left, right, SLOTS, slice(start, start + len(left))),
                products.Rule(weight.expand(len(left), 3), least=threshold.expand(len(left), 3)),
                mean=True,
            )
            kept += int(found.counts[:, 0].sum())
            start += len(left)
        assert kept == counts[0, task]


def check_elect_tells_of_sums_that_are_zero(device: str) -> None:
    """Two tasks that cancel at every entry leave the choice to the caller."""
    from vllm_merge.kernels import products

    left = torch.ones(1, 33, 2, device=device)
    right = torch.tensor([[1.0], [-1.0]], device=device).expand(2, 40)[None].contiguous()
    both = products.Products(left, right, (slice(0, 1), slice(1, 2)), slice(0, 1))
    ones = torch.ones(1, 2, device=device)
    rule = products.Rule(ones, least=0 * ones)
    found = products.elect(both, rule, mean=True)
    assert bool(found.undecided)
    assert not found.merged.any()
    assert found.counts.tolist() == [[33 * 40, 33 * 40]]
    assert found.votes.tolist() == [0]
    for sign in (1.0, -1.0):
        decided = products.elect(both, rule, mean=True, majority=sign * ones[:, 0])
        assert torch.equal(decided.merged, torch.full((1, 33, 40), sign, device=device))


def masked(products: object, seed: int, device: str, shape: tuple[int, int]) -> tuple[Tensor, object]:
    """A mask of random keys and densities, (2 modules, 3 tasks, *shape), and the rule that has it, of weight 1."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(1 << 63), (1 << 63) - 1, (2, 3), generator=generator)
    density = torch.rand(2, 3, generator=generator).clamp_min(0.05)
    density[0, 1], density[1, 2] = 1.0, 0.5
    corner = [int(x) for x in torch.randint(0, 1 << 17, (2,), generator=generator)] if seed else [0, 0]
    rows, cols = (slice(start, start + size) for start, size in zip(corner, shape, strict=True))
    mask = keep_mask(keys, density[..., None, None], rows, cols).to(device)
    ones, limits = torch.ones(2, 3, device=device), mask_limits(density).to(device)
    return mask, (tuple(corner), products.Rule(ones, keys=keys.to(device), limits=limits))


def check_masks_are_those_of_the_definition(device: str) -> None:
    """To the bit, in any part of a module, keys of any sign: of tasks that are 1, 2 and 4 everywhere, the sum tells all masks."""
    from vllm_merge.kernels import products

    for seed, shape in enumerate([(70, 90), (33, 65), (1, 130)]):
        mask, (corner, rule) = masked(products, seed, device, shape)
        left = torch.tensor([1.0, 2.0, 4.0], device=device).expand(2, shape[0], 3).contiguous()
        slots = (slice(0, 1), slice(1, 2), slice(2, 3))
        given = products.Products(left, torch.ones(2, 3, shape[1], device=device), slots, slice(0, 2), corner)
        expected = (mask * torch.tensor([1, 2, 4], device=device)[:, None, None]).sum(1)
        assert torch.equal(products.add(given, rule).long(), expected)
        assert torch.equal(products.elect(given, rule, mean=False).merged.long(), expected)
        assert products.elect(given, rule, mean=False).counts.tolist() == [
            [int(kept), 0] for kept in mask.any(1).sum((1, 2))
        ]


def tasks_of_whole_numbers(seed: int) -> tuple[Tensor, Tensor, tuple[slice, ...]]:
    """Random shapes, up to four tasks of random ranks, one of them again and again with the other sign: sums of them are exact."""
    generator = torch.Generator().manual_seed(seed)

    def number(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (1,), generator=generator))

    modules, rows, columns = number(1, 2), number(1, 90), number(1, 140)
    parts = []
    for _ in range(number(1, 4)):
        rank = number(1, 20)
        left = torch.randn(modules, rows, rank, generator=generator).round()
        parts.append((left, torch.randn(modules, rank, columns, generator=generator).round()))
    if seed % 2:
        parts += [parts[0], (-parts[0][0], parts[0][1])]
    ends = torch.tensor([part[0].shape[2] for part in parts]).cumsum(0).tolist()
    slots = tuple(map(slice, [0, *ends[:-1]], ends))
    return torch.cat([left for left, _ in parts], 2), torch.cat([right for _, right in parts], 1), slots


def check_bounds_masks_and_scales_together(device: str) -> None:
    """Sums, elected sums, votes, magnitudes and signs of entries between two bounds under a mask, exactly; denormal ones, too."""
    from vllm_merge.kernels import agreement, products

    for seed, unit in enumerate((1.0, 1.0, 2.0**-144, 2.0**-144, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        left, right, slots = tasks_of_whole_numbers(seed)
        left, right = left.to(device) * unit**0.5, right.to(device) * unit**0.5
        values = torch.stack([left[:, :, slot] @ right[:, slot] for slot in slots], dim=1)
        shape = values.shape[:2]
        corner = tuple(torch.randint(0, 1 << 17, (2,), generator=generator).tolist())
        rows, cols = (slice(at, at + size) for at, size in zip(corner, values.shape[2:], strict=True))
        keys = torch.randint(-(1 << 63), (1 << 63) - 1, shape, generator=generator).to(device)
        density = torch.rand(shape, generator=generator).clamp_min(0.05).to(device)
        bounds = torch.randint(0, 12, (2, *shape), generator=generator).mul(unit).to(device).sort(0).values
        weight = torch.randint(-2, 3, shape, generator=generator).float().to(device)
        scale = torch.randint(-2, 3, shape, generator=generator).float().exp2().to(device)
        given = products.Products(left, right, slots, slice(0, len(left)), corner)
        minus = torch.full((len(left),), -1.0, device=device)
        for least, most, masks in ((*bounds, True), (bounds[0], None, False), (None, None, True)):
            limits = mask_limits(density) if masks else None
            rule = products.Rule(weight, scale, least, most, keys if masks else None, limits)
            kept = values
            if least is not None:
                kept = kept * (values.abs() >= least[..., None, None])
            if most is not None:
                kept = kept * (values.abs() <= most[..., None, None])
            if masks:
                kept = kept * keep_mask(keys, density[..., None, None], rows, cols)
            weighted = kept * (weight * scale)[..., None, None]
            total, magnitude = weighted.sum(1), weighted.abs().sum(1)
            assert torch.equal(products.add(given, rule), total)
            assert torch.equal(products.votes(given, rule), total.sign().sum((1, 2)).long())
            sums = torch.stack([values.abs().sum((2, 3)), kept.abs().sum((2, 3))], dim=2)
            assert torch.equal(products.magnitudes(given, rule), sums.double())
            mean = most is None
            wide = weight[..., None, None]
            expected = disjoint_merge(weighted.clone(), total, magnitude, wide, mean, lambda sign=minus: sign)
            found = products.elect(given, rule, mean=mean, majority=minus)
            least_number = 2.0**-149
            torch.testing.assert_close(
                found.merged, expected, rtol=1e-6 if mean else 0, atol=2 * least_number if mean else 0
            )
            counts = torch.stack([(magnitude > 0).sum((1, 2)), (total.abs() < magnitude).sum((1, 2))], dim=1)
            assert torch.equal(found.counts, counts)
            for election in ("total", "frequency"):
                side = Side(kept, (weight * scale)[..., None, None], keys, 0, divisor=None)
                by_count = agreement.by_count(given, rule, frequency=election == "frequency")
                torch.testing.assert_close(by_count, elected(side, election), rtol=1e-6, atol=2 * least_number)
        strictness = torch.randint(-3, 2, shape, generator=generator).float().exp2().to(device)
        wide = {"weight": weight[..., None, None], "strictness": strictness[..., None, None]}
        for enough in range(1, len(slots) + 1):
            expected = consensus(SimpleNamespace(values=values), None, **wide, agreement=enough)
            assert torch.equal(agreement.wanted(given, weight, strictness, enough), expected)
        signed = values * weight.sign()[..., None, None]
        above, below = signed.amax(1) > 0, signed.amin(1) < 0
        counts = torch.stack([(above & below).sum((1, 2)), (above | below).sum((1, 2))], dim=1)
        assert torch.equal(products.signs(given, weight), counts)


def check_x_and_its_negative_cancel(device: str) -> None:
    """Exactly, whatever they are multiplied with: a sum that is not rounded apart from its products would leave a rest."""
    from vllm_merge.kernels import products

    generator = torch.Generator().manual_seed(8)
    left = torch.randn(1, 40, 3, generator=generator)
    right = torch.randn(1, 3, 70, generator=generator).to(device)
    both = torch.cat([left, -left], 2).to(device), torch.cat([right, right], 1)
    given = products.Products(*both, (slice(0, 3), slice(3, 6)), slice(0, 1))
    rule = products.Rule(torch.full((1, 2), 0.3, device=device), torch.full((1, 2), 1 / 0.7, device=device))
    assert not products.add(given, rule).any()
    assert products.votes(given, rule).tolist() == [0]
    assert bool(products.elect(given, rule, mean=True).undecided)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is merged is written to memory full of what no entry is."""
    from vllm_merge.kernels.products import Products

    empty = Products.empty
    with patch.object(Products, "empty", lambda self: empty(self).fill_(torch.nan)):
        yield


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("check", checks_of(globals()))
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    with poisoned():
        check("cuda")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("seed", range(5))
def test_thresholds_of_random_shapes(seed: int) -> None:
    """Enough entries for the guess to be made as it stands; whole numbers, so that the products are exact."""
    from vllm_merge.kernels import selection

    generator = torch.Generator().manual_seed(seed)
    size = torch.randint(900, 2100, (3,), generator=generator).tolist()
    left = torch.randn(3, size[0], 12, generator=generator).mul(2).round().cuda()
    right = torch.randn(3, 12, size[1], generator=generator).mul(1e4).round().cuda()
    given = [(left, right)]
    counts = (torch.rand(1, 3, generator=generator) * 3 * size[0] * size[1]).long().add(1).cuda()
    assert torch.equal(selection.kth_largest(batches(given), counts), kth_largest(stored(given), counts))
    by_module = (torch.rand(2, 3, 3, generator=generator) * size[0] * size[1]).long().add(1).cuda()
    expected = torch.stack([kth_largest(stored(given), one) for one in by_module])
    assert torch.equal(selection.kth_largest(batches(given), by_module), expected)
    if 3 * size[0] * size[1] > selection._FEW:
        assert selection._kth_largest_by_guess(batches(given), by_module) is not None


def test_in_tritons_interpreter() -> None:
    interpret("tests.kernels.test_products", globals())


if __name__ == "__main__":
    with poisoned():
        run_all(globals())
