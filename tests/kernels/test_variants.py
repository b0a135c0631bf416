# SPDX-License-Identifier: Apache-2.0
"""What a server compiles when it starts is all that its merges meet: by the keys under which Triton looks for what is compiled.

No GPU is needed: the kernels are asked for, for a GPU that is played, and neither compiled nor run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from vllm_merge import Adapter, LoraFactors, merge
from vllm_merge.adapters.arrangement import arranged
from vllm_merge.adapters.stacking import Sources, gather_stacks, group_modules
from vllm_merge.algebra.tiles import parts
from vllm_merge.engine.job import Job
from vllm_merge.errors import UserInputError

pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_merge.kernels import adam, agreement, descent, orthonormal, powers, products, selection, tridiagonal, turns
from vllm_merge.kernels.variants import variants

CPU = torch.device("cpu")
WIDEST = 128
MODELS = {
    "8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "0.5b": ((896, 896), (128, 896), (4864, 896)),
}
MODELS["0.5b"] += ((896, 4864),)
KINDS = ((8, 16), (3, 16), (2, 64), (5, 4), (3, 12), (2, 9), (4, 32))  # adapters, rank of each

Keys = set[tuple[str, str]]


class PlayedGpu:
    """What Triton asks before it looks for a kernel; a device number that no other test has."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Nothing:
    """A kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *arguments: object) -> None: ...

    def run(self, *arguments: object) -> None: ...


@pytest.fixture(scope="module")
def every() -> Iterator[Keys]:
    """The kernels that were launched, with their keys, as a set that grows."""
    if not isinstance(products._elect, JITFunction):
        pytest.skip("Triton interprets in this process")
    keys: Keys = set()

    def compiled(self: JITFunction, key: str, *more: object) -> Nothing:
        keys.add((self.fn.__name__, key))
        return Nothing()

    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(driver, "_active", PlayedGpu())
        patched.setattr(JITFunction, "_do_compile", compiled)
        yield keys


@pytest.fixture(scope="module")
def there(every: Keys) -> Keys:
    """Those that are compiled at the start of a server for ranks up to WIDEST."""
    return warmed(every, WIDEST)


@pytest.fixture
def asked(every: Keys, there: Keys) -> Keys:
    """What a test asks for."""
    every.clear()
    return every


def warmed(every: Keys, widest: int) -> Keys:
    every.clear()
    for launch in variants(CPU, widest, torch.bfloat16):
        launch()
    found = set(every)
    every.clear()
    return found


def products_of(d_out: int, d_in: int, adapters: int, rank: int, space: str) -> products.Products:
    """Of some modules of a batch that is not the first; nothing is in this memory, and little is touched."""
    k = adapters * rank
    rows = d_out if space == "delta" else k
    left, right = torch.empty(4, rows, k)[1:], torch.empty(4, k, d_in)[1:]
    slots = [slice(rank * index, rank * (index + 1)) for index in range(adapters)]
    return products.Products(left, right, slots, slice(1, 4), corner=(0, 0))


@pytest.mark.parametrize("model", MODELS)
def test_entries_are_made_by_kernels_that_are_there(asked: Keys, there: Keys, model: str) -> None:
    for shape in MODELS[model]:
        for adapters, rank in KINDS:
            for space in ("knots", "delta"):
                given = products_of(*shape, adapters, rank, space)
                one = torch.ones(4, adapters)[1:]
                bits = torch.ones(4, adapters, dtype=torch.int64)[1:]
                trimmed, band = products.Rule(one, least=one), products.Rule(one, one, one, one)
                masked = products.Rule(one, one, keys=bits, limits=bits)
                for rule in (trimmed, band, masked):
                    for mean in (True, False):
                        for majority in (None, torch.ones(4)[1:]):
                            products.elect(given, rule, mean=mean, majority=majority)
                for rule in (trimmed, masked):
                    products.votes(given, rule)
                for rule in (band, masked):
                    products.add(given, rule)
                    products.magnitudes(given, rule)
                for frequency in (True, False):
                    agreement.by_count(given, trimmed, frequency=frequency)
                agreement.wanted(given, one, one, 3)
                selection._kth_largest_by_digits(lambda given=given: [given], torch.ones(4, adapters).long())
    assert {name for name, _ in asked} == {"_elect", "_add", "_magnitudes", "_digits", "_by_count", "_wanted"}
    assert asked <= there


def test_a_guess_is_made_by_kernels_that_are_there(asked: Keys, there: Keys) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(16, 48, 48, generator=generator), torch.randn(16, 48, 8192, generator=generator)
    given = products.Products(left, right, [slice(0, 16), slice(16, 32), slice(32, 48)], slice(0, 16))
    for counts in (torch.full((1, 1, 3), 1 << 20), torch.full((2, 16, 3), 1 << 16)):
        lowest, highest, shift = torch.zeros(3, *counts.shape, dtype=torch.int32)
        for above in (torch.zeros(counts.shape).long(), None):
            counters = torch.zeros(counts.numel(), 5, dtype=torch.int32)
            selection.count_between(lambda: [given], lowest, highest, shift, above, counters)
        selection.kth_largest(lambda: [given], counts)
    assert len({key for name, key in asked if name == "_between"}) == 2, "with what is above, and without"
    assert asked <= there


@pytest.mark.parametrize("space", ["knots", "delta"])
def test_every_method_that_makes_its_entries_finds_its_kernels(asked: Keys, there: Keys, space: str) -> None:
    """With the parameters that ask for another kernel; the merges themselves, small ones, whose results are zeros."""
    from vllm_merge.methods.registry import list_methods

    generator = torch.Generator().manual_seed(1)

    def adapter(name: str) -> Adapter:
        factors = [torch.randn(shape, generator=generator) for shape in ((16, 96), (64, 16)) * 2]
        return Adapter(name, {"a": LoraFactors(*factors[:2]), "b": LoraFactors(*factors[2:])})

    adapters = [adapter(name) for name in "xyz"]
    methods = [method for method in list_methods() if method.on_the_fly and space in method.spaces]
    merged: list[str] = []
    with patch.object(Job, "on_the_fly", True), patch.object(products.Products, "empty", zeros):
        for method in methods:
            for parameters in ({}, {"normalize": False}, {"rescale": "l1"}, {"rescale": True}, {"trim": "module"}):
                with suppress(UserInputError):  # a method has not all of these parameters
                    merge(adapters, merge_method=method.name, space=space, parameters=parameters, report="brief")
                    merged.append(method.name)
    assert {"ties", "dare_ties", "breadcrumbs"} <= set(merged) == {method.name for method in methods}
    assert len(merged) >= 2 * len(methods)
    assert {"_elect", "_add", "_magnitudes", "_digits"} <= {name for name, _ in asked}
    assert asked <= there


def zeros(given: products.Products) -> torch.Tensor:
    return torch.zeros(*given.left.shape[:2], given.right.shape[2])


def test_matrices_of_any_size_find_their_kernels(asked: Keys, there: Keys) -> None:
    """Of stacks up to 128; also where a part of a batch begins at an odd one, as it does beside requests."""
    for k in (3, 4, 10, 16, 24, 36, 48, 64, 100, 128):
        matrices = torch.eye(k, dtype=torch.float64).expand(3, k, k)
        tridiagonal.eigh(matrices)
        with turns.taking_turns(lambda: None):
            tridiagonal.eigh(matrices)
        for wide in {1, k // 4, k // 2}:
            columns = torch.ones(6, k, max(1, wide), dtype=torch.float64)[1:]
            orthonormal.orthonormalize(columns)
            orthonormal.advance(columns, columns, columns.clone(), columns.new_empty(4, 5))
    for adapters, rank in KINDS:
        k = adapters * rank
        if powers.fits(adapters, rank, k, k, rank):
            tasks, columns = (torch.ones(6, k, wide, dtype=torch.float64)[1:] for wide in (k, rank))
            powers.Powers(tasks, tasks, rank, rank, 6)(columns, columns)
    for adapters, rank in KINDS:
        slots = [slice(rank * index, rank * (index + 1)) for index in range(adapters)]
        gram = torch.eye(adapters * rank, dtype=torch.float64).expand(3, -1, -1).clone()
        for power in (1, 2):
            descent.descended(gram, slots, torch.ones_like(gram[:, 0, 0]), 2, power=power, gamma=0.5)
    assert {name for name, _ in asked} == {
        "_reflect",
        "_rotate",
        "_order",
        "_orthonormalize",
        "_advance",
        "_judge",
        "_powers",
    }
    assert asked <= there


@pytest.mark.parametrize("model", MODELS)
def test_steps_of_adam_are_taken_by_kernels_that_are_there(asked: Keys, there: Keys, model: str) -> None:
    for d in {side for shape in MODELS[model] for side in shape} | {33}:
        for adapters, rank in KINDS:
            start = torch.empty(2, adapters * rank, d)
            moved = torch.empty(start.shape, dtype=torch.float64)
            for step in (0, 1, 16):
                adam.stepped(moved, moved, moved, moved, start, moved[0, 0, :2], torch.ones(17, 7).double(), step)
    assert {name for name, _ in asked} == {"_step"}
    assert asked <= there


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_are_gathered_by_kernels_that_are_there(
    asked: Keys, there: Keys, model: str, source: torch.dtype
) -> None:
    for number, rank in ((8, 16), (3, 4), (2, 64), (2, 12), (2, 100), (1, 128)):
        adapters = [
            Adapter(
                str(index),
                {
                    f"layers.{at}": LoraFactors(
                        torch.empty(rank, d_in, dtype=source), torch.empty(d_out, rank, dtype=source)
                    )
                    for at, (d_out, d_in) in enumerate(MODELS[model])
                },
            )
            for index in range(number)
        ]
        arrangement = arranged(tuple(group_modules(adapters)))
        for target in (torch.float32, torch.bfloat16):
            memory = torch.empty(arrangement.size, dtype=target)
            gather_stacks(arrangement, memory, adapters, Sources(CPU, 0))
    assert {name for name, _ in asked} == {"_gather"}
    assert asked <= there


def test_what_is_not_compiled_at_the_start_is_found_out(asked: Keys) -> None:
    """Ranks beyond the widest, and rows that no thread can read eight of: these checks can fail."""
    few = warmed(asked, widest=16)
    one = torch.ones(3, 2)
    products.elect(products_of(64, 64, 2, 16, "knots"), products.Rule(one, least=one), mean=True)
    assert asked <= few
    for given in (products_of(64, 64, 2, 64, "knots"), products_of(64, 60, 2, 16, "knots")):
        asked.clear()
        products.elect(given, products.Rule(one, least=one), mean=True)
        assert asked
        assert not asked & few


def test_strips_of_a_large_module_begin_and_end_where_kernels_read_several_entries() -> None:
    """Dense entries of 3, 5, 6 or 7 adapters do not divide a tile evenly."""
    for adapters in (3, 5, 6, 7):
        given = products_of(4096, 14336, adapters, 16, "delta")
        space = SimpleNamespace(shape=(1, adapters, *given.left.shape[1:2], *given.right.shape[2:]))
        found = list(parts(space, 1 << 28))
        assert [part.cols.start % 16 for part in found] == [0] * len(found)
        assert (found[-1].cols.stop, found[-1].rows) == (14336, slice(0, 4096))
        assert all(one.cols.stop == other.cols.start for one, other in pairwise(found))
    assert len(found) > 1
