# SPDX-License-Identifier: Apache-2.0
"""Grouping and stacking of adapters' factors: where each stands, what is padding, and what a GPU is given to copy."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, map_factors, random_adapter, three
from vllm_merge import Adapter, LoraFactors
from vllm_merge.adapters.places import ABSENT
from vllm_merge.adapters.stacking import (
    ModuleGroup,
    Sources,
    _run_of_bytes,
    fill_on_gpu,
    group_modules,
    side_by_side,
    stack_group,
)

CPU = torch.device("cpu")


def uneven() -> list[Adapter]:
    """x everywhere; y of another rank at one module and absent from another; z at one module alone."""
    x, y, z = three()
    narrow = y.factors["layers.1.q_proj"]
    mine = {**y.factors, "layers.1.q_proj": LoraFactors(narrow.A[:2], narrow.B[:, :2])}
    del mine["layers.0.up_proj"]
    return [x, Adapter("y", mine), Adapter("z", {"layers.1.q_proj": z.factors["layers.1.q_proj"]})]


def in_one_run(adapter: Adapter, dtype: torch.dtype = torch.float32, gap: int = 0) -> Adapter:
    """The same adapter as views of one run of bytes, as a file that was read whole, with a gap after every tensor."""
    tensors = [tensor.to(dtype) for pair in adapter.factors.values() for tensor in (pair.A, pair.B)]
    block = torch.zeros(sum(tensor.nbytes + gap for tensor in tensors), dtype=torch.uint8)
    views, at = [], 0
    for tensor in tensors:
        view = block[at : at + tensor.nbytes].view(dtype).view(tensor.shape)
        views.append(view.copy_(tensor))
        at += tensor.nbytes + gap
    pairs = zip(views[::2], views[1::2], strict=True)
    named = zip(adapter.factors.items(), pairs, strict=True)
    return Adapter(adapter.name, {module: LoraFactors(a, b, given.scaling) for (module, given), (a, b) in named})


def products(group: ModuleGroup, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """B @ A of every module."""
    return dict(zip(group.modules, b.double() @ a.double(), strict=True))


def test_pieces_of_the_same_ranks_have_no_padding() -> None:
    adapters = uneven()
    groups = group_modules(adapters)
    assert [group.modules for group in groups] == [
        ("layers.0.q_proj", "layers.1.q_proj"),
        ("layers.0.up_proj", "layers.1.up_proj"),
    ]
    pieces = [piece for group in groups for piece in group.by_ranks()]
    assert [(piece.modules, piece.ranks, piece.stacked_rank) for piece in pieces] == [
        (("layers.0.q_proj",), ((3, 5, 0),), 8),
        (("layers.1.q_proj",), ((3, 2, 2),), 7),
        (("layers.0.up_proj",), ((3, 0, 0),), 3),
        (("layers.1.up_proj",), ((3, 5, 0),), 8),
    ]
    for piece in pieces:
        stack = stack_group(piece, adapters, CPU)
        assert stack.A.abs().sum(2).all(), "no row of A is padding"
        assert stack.B.abs().sum(1).all(), "no column of B is"


def test_modules_of_the_same_ranks_stay_together() -> None:
    (piece,) = [piece for group in group_modules(three())[:1] for piece in group.by_ranks()]
    assert piece.modules == ("layers.0.q_proj", "layers.1.q_proj")
    assert piece.slots == (slice(0, 3), slice(3, 8), slice(8, 10))


@pytest.mark.parametrize("chosen", [[0], [2, 0], [0, 1, 2], []])
def test_a_group_of_some_of_its_adapters(chosen: list[int]) -> None:
    """Their terms stand in the order that was asked for, without a hole where the others were."""
    group = group_modules(three())[0]
    some = group.only(chosen)
    assert some.modules == group.modules
    assert some.stacked_rank == sum(group.ranks[0][index] for index in chosen)
    if chosen:
        picked = [three()[index] for index in chosen]
        stack = stack_group(some, picked, CPU)
        expected = sum(adapter.factors["layers.1.q_proj"].delta() for adapter in picked)
        assert torch.allclose((stack.B @ stack.A)[1], expected, atol=1e-6)


def test_factors_side_by_side_are_the_weighted_sum() -> None:
    adapters = three()
    group = next(group_modules(adapters)[1].by_ranks())
    shares = torch.tensor([[1.0, -0.5, 2.0], [0.25, 3.0, 1.0]], dtype=torch.float64)
    a, b, finite = side_by_side(group, adapters, shares, CPU, torch.float32, None)
    assert finite
    assert (a.shape, b.shape) == ((2, 10, 24), (2, 40, 10))
    for module, share, product in zip(group.modules, shares.tolist(), b @ a, strict=True):
        expected = sum(c * adapter.factors[module].delta() for c, adapter in zip(share, adapters, strict=True))
        assert torch.allclose(product, expected, atol=1e-5)
    assert torch.equal(a[0, :3], adapters[0].factors[group.modules[0]].A), "A is copied as it is"
    assert not side_by_side(group, adapters, shares * 1e6, CPU, torch.float16, None)[2]


def test_a_file_that_was_read_whole_is_one_run() -> None:
    adapter = in_one_run(random_adapter("x", 4, 1))
    run = _run_of_bytes(adapter)
    assert run is not None
    assert run.numel() == adapter.nbytes
    first = next(iter(adapter.factors.values()))
    assert run.data_ptr() == first.A.data_ptr()
    assert torch.equal(run[: first.A.nbytes].view(torch.float32).view(first.A.shape), first.A)


def test_a_run_may_begin_inside_a_storage_and_have_gaps() -> None:
    adapter = in_one_run(random_adapter("x", 4, 1), torch.bfloat16, gap=64)
    later = Adapter("later", {module: adapter.factors[module] for module in list(adapter.factors)[1:]})
    run = _run_of_bytes(later)
    assert run is not None
    assert run.data_ptr() == later.factors["layers.0.up_proj"].A.data_ptr()
    assert later.nbytes < run.numel() < 2 * later.nbytes


@pytest.mark.parametrize("kind", ["tensors apart", "mostly gaps", "columns apart", "no module"])
def test_what_is_no_run_is_copied_factor_by_factor(kind: str) -> None:
    whole = random_adapter("x", 4, 1)
    adapter = {
        "tensors apart": whole,
        "mostly gaps": in_one_run(whole, gap=4096),
        "columns apart": map_factors(in_one_run(whole), lambda f: LoraFactors(f.A[:, ::2], f.B)),
        "no module": Adapter("x", {}),
    }[kind]
    assert _run_of_bytes(adapter) is None


def at_address(address: int, stride: int, shape: torch.Size) -> Tensor:
    """What lies there, float32."""
    rows, columns = shape
    count = (rows - 1) * stride + columns
    flat = torch.frombuffer((ctypes.c_float * count).from_address(address), dtype=torch.float32)
    return flat.as_strided((rows, columns), (stride, 1)).clone()


@pytest.fixture
def copied_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are copied within the host's memory, as if that were the GPU's."""
    monkeypatch.setattr(Sources, "_copied", lambda self, run: run.clone())


@pytest.mark.usefixtures("copied_apart")
@pytest.mark.parametrize("keep_bytes", [0, 1 << 20])
def test_an_address_is_where_a_factor_lies(keep_bytes: int) -> None:
    """Of a run, of tensors by themselves, of columns of wider ones, of ones whose columns lie apart, and of other dtypes."""
    run = in_one_run(random_adapter("x", 4, 1))
    wide = torch.randn(6, 40)
    apart = {
        "alone": LoraFactors(torch.randn(5, 7), torch.randn(9, 5)),
        "columns": LoraFactors(wide[:, 3:20], wide[:5, 10:16]),
        "turned": LoraFactors(wide[:, ::2], wide.mT[:, :6]),
        "double": LoraFactors(torch.randn(3, 4).double(), torch.randn(4, 3).double()),
    }
    sources = Sources(CPU, keep_bytes, [run, run.named("again")])
    for adapter in (run, Adapter("apart", apart)):
        places = adapter.places
        at = places.positions([*adapter.factors, "no such module"])
        assert at.tolist() == [*range(len(adapter.factors)), ABSENT]
        for side in (0, 1):
            addresses, strides = sources.addresses(places, at[:-1], side)
            gc.collect()
            for pair, address, stride in zip(adapter.factors.values(), addresses, strides, strict=True):
                factor = (pair.A, pair.B)[side]
                assert torch.equal(at_address(int(address), int(stride), factor.shape), factor.float())
                if adapter is run:
                    assert (address == factor.data_ptr()) == (keep_bytes == 0)


@pytest.mark.usefixtures("copied_apart")
def test_runs_are_kept_once_each_and_within_their_bytes() -> None:
    x, y = in_one_run(random_adapter("x", 4, 1)), in_one_run(random_adapter("y", 4, 2))
    apart = random_adapter("apart", 4, 3)
    given = [x, x.named("again"), apart, y]
    assert [run.numel() for run in Sources(CPU, 1 << 20, given)._kept] == [x.nbytes, y.nbytes]
    assert len(Sources(CPU, x.nbytes, given)._kept) == 1
    assert Sources(CPU, x.nbytes - 1, given)._kept == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
@pytest.mark.parametrize("seed", range(4))
def test_a_gpu_gets_the_stack_that_a_cpu_makes(keep_bytes: int, seed: int) -> None:
    """Whatever the adapters are: in runs or not, on the host or the GPU, of mixed dtypes and ranks, lacking modules."""
    device = torch.device("cuda")
    x, y, z = uneven()
    mixed = map_factors(z, lambda f: LoraFactors(f.A.half(), f.B.bfloat16(), f.scaling))
    there = map_factors(random_adapter("g", 6, seed), lambda f: LoraFactors(f.A.cuda(), f.B.cuda(), 0.5))
    given = [in_one_run(x), in_one_run(y, torch.bfloat16, gap=16), mixed, there, random_adapter("r", 2 + seed, seed)]
    on_cpu = [map_factors(adapter, lambda f: LoraFactors(f.A.cpu(), f.B.cpu(), f.scaling)) for adapter in given]
    sources = Sources(device, keep_bytes, given)
    for _ in range(2):
        for group in group_modules(given):
            for piece in (group, *group.batches(1), *group.by_ranks()):
                expected = stack_group(piece, on_cpu, CPU)
                stack = stack_group(piece, given, device, sources)
                assert torch.equal(stack.A.cpu(), expected.A)
                assert torch.equal(stack.B.cpu(), expected.B)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_puts_factors_side_by_side_and_tells_what_does_not_fit() -> None:
    adapters, device = [in_one_run(adapter) for adapter in three()], torch.device("cuda")
    group = next(group_modules(adapters)[0].by_ranks())
    shares = torch.tensor([[1.0, -0.5, 2.0], [0.25, 3.0, 1.0]], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b, finite = side_by_side(group, adapters, shares, device, dtype, Sources(device, 1 << 20, adapters))
        wanted_a, wanted_b, _ = side_by_side(group, adapters, shares, CPU, dtype, None)
        assert finite
        assert torch.equal(a.cpu(), wanted_a)
        assert torch.allclose(b.cpu().float(), wanted_b.float(), rtol=2 * torch.finfo(dtype).eps)
    assert not side_by_side(group, adapters, shares * 1e6, device, torch.float16, None)[2]
    a = torch.empty(2, 10, SHAPES["layers.0.q_proj"][1], device=device)
    b = torch.empty(2, SHAPES["layers.0.q_proj"][0], 10, device=device)
    assert int(fill_on_gpu(group, adapters, Sources(device, 0), a, b)) == 0
