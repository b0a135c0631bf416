# SPDX-License-Identifier: Apache-2.0
"""Grouping and stacking of adapters' factors: where each stands, what is padding, and what a GPU is given to copy."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, map_factors, random_adapter, three
from vllm_merge import Adapter, LoraFactors
from vllm_merge.adapters.arrangement import FactorViews, arranged
from vllm_merge.adapters.pieces import _known, pieces_of
from vllm_merge.adapters.places import ABSENT, ADDRESS, ON_HOST, STRIDE
from vllm_merge.adapters.stacking import (
    ModuleGroup,
    Sources,
    gather_stacks,
    group_modules,
    rejoined,
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
    arrangement = arranged(tuple(group_modules(adapters)))
    shares = torch.tensor([[1.0, -0.5, 2.0], [0.25, 3.0, 1.0], [1.0, 1.0, -1.0], [7.0, 0.5, 0.1]], dtype=torch.float64)
    memory = torch.empty(arrangement.size)
    assert not side_by_side(arrangement, memory, adapters, shares, None)
    merged = FactorViews(memory, arrangement)
    modules = [module for group in arrangement.groups for module in group.modules]
    for module, share in zip(modules, shares.tolist(), strict=True):
        expected = sum(c * adapter.factors[module].delta() for c, adapter in zip(share, adapters, strict=True))
        assert torch.allclose(merged[module].delta(), expected, atol=1e-5)
        assert torch.equal(merged[module].A[:3], adapters[0].factors[module].A), "A is copied as it is"
    assert side_by_side(arrangement, memory.half(), adapters, shares * 1e6, None)


def test_views_of_factors_are_a_mapping_in_natural_order() -> None:
    arrangement = arranged(tuple(group_modules(three())))
    assert [group.modules[0] for group in arrangement.groups] == ["layers.0.q_proj", "layers.0.up_proj"]
    memory = torch.randn(arrangement.size)
    views = FactorViews(memory, arrangement)
    assert list(views) == list(SHAPES)
    assert len(views) == 4
    for module, shape in SHAPES.items():
        assert views[module].shape == shape
        assert views[module].rank == 10
        assert views[module] is views[module]
        assert views[module].A.untyped_storage().data_ptr() == memory.data_ptr(), "nothing is copied"
    assert "layers.2.q_proj" not in views
    with pytest.raises(KeyError, match=r"layers\.2\.q_proj"):
        views["layers.2.q_proj"]


def there(adapter: Adapter) -> Adapter:
    """The adapter as if its factors were not in host memory."""
    adapter.places.numbers[..., ON_HOST] = 0
    return adapter


def test_pieces_are_found_again_for_the_same_adapters_alone() -> None:
    """Until an adapter is gone, whoever has its address then; nothing keeps one alive."""
    _known.clear()
    x, y = there(random_adapter("x", 3, 1)), there(random_adapter("y", 5, 2))
    arrangement, sources = arranged(tuple(group_modules([x, y]))), Sources(CPU, 0)

    def pieces(*adapters: Adapter) -> object:
        return pieces_of(arrangement, [adapter.places for adapter in adapters], sources)

    first = pieces(x, y)
    assert pieces(x, y) is first
    assert pieces(x, y.named("z")) is first, "another name of the same factors"
    assert pieces(there(random_adapter("x", 3, 1)), y) is not first
    gone = weakref.ref(x.places)
    assert any(known is first for known in _known.values())
    del x
    gc.collect()
    assert gone() is None
    assert not _known, "nor what a GPU was told of it"
    for _ in range(20):  # one of these may stand where x stood
        again = there(random_adapter("x", 3, 1))
        assert pieces(again, y) is not first
        del again


def test_pieces_that_were_not_asked_for_for_longest_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _known.clear()
    monkeypatch.setattr("vllm_merge.adapters.pieces._KEPT", 3)
    adapters = [there(random_adapter(name, 3, index)) for index, name in enumerate("abcd")]
    arrangement, sources = arranged(tuple(group_modules(adapters[:1]))), Sources(CPU, 0)
    a, b, _ = (pieces_of(arrangement, [adapter.places], sources) for adapter in adapters[:3])
    assert pieces_of(arrangement, [adapters[0].places], sources) is a
    pieces_of(arrangement, [adapters[3].places], sources)
    assert len(_known) == 3
    assert pieces_of(arrangement, [adapters[0].places], sources) is a
    assert pieces_of(arrangement, [adapters[1].places], sources) is not b


def test_a_launch_has_one_dtype_and_a_bounded_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = random_adapter("x", 3, 1), map_factors(random_adapter("y", 5, 2), lambda f: LoraFactors(f.A.half(), f.B))
    (group, _), places = group_modules([x, y]), [x.places, y.places]
    everything = pieces_of(arranged((group,)), places, Sources(CPU, 0))
    assert everything.launches == ((torch.float16, 0, 2), (torch.float32, 2, 8))
    assert everything.weight_of.tolist() == [-1, -1, -1, 0, 1, -1, 2, 3]
    monkeypatch.setattr("vllm_merge.adapters.pieces._AT_ONCE", 300)
    bounded = pieces_of(arranged((group,)), places, Sources(CPU, 0))
    assert [first for _, first, _ in bounded.launches] == [0, *(last for _, _, last in bounded.launches[:-1])]
    assert bounded.launches[-1][2] == bounded.count == 8
    elements = bounded.numbers[4] * bounded.numbers[5]
    for dtype, first, last in bounded.launches:
        assert elements[first + 1 : last].sum() < 300
        assert {dtype} == {(torch.float16, torch.float32)[int(piece > 1)] for piece in range(first, last)}
    assert len(bounded.launches) > 2


def test_adapters_on_the_host_are_told_anew() -> None:
    """They are copied for every merge, to other places."""
    x, y = random_adapter("x", 3, 1), there(random_adapter("y", 5, 2))
    arrangement, sources = arranged(tuple(group_modules([x, y]))), Sources(CPU, 0)
    places = [x.places, y.places]
    assert pieces_of(arrangement, places, sources) is not pieces_of(arrangement, places, sources)


def test_stacks_in_one_run_of_memory_do_not_overlap() -> None:
    arrangement = arranged(tuple(group_modules(uneven())))
    memory = torch.zeros(arrangement.size)
    for index, group in enumerate(arrangement.groups):
        for part in arrangement.stack(memory, index):
            assert part.is_contiguous()
            assert part.storage_offset() % 64 == 0
            part += 1
        assert (len(group.modules), group.stacked_rank) == arrangement.stack(memory, index)[0].shape[:2]
    assert memory.max() == 1


def test_a_file_that_was_read_whole_is_one_run() -> None:
    adapter = in_one_run(random_adapter("x", 4, 1))
    run = adapter.places.run
    assert run is not None
    assert run.numel() == adapter.nbytes
    first = next(iter(adapter.factors.values()))
    assert run.data_ptr() == first.A.data_ptr()
    assert torch.equal(run[: first.A.nbytes].view(torch.float32).view(first.A.shape), first.A)


def test_a_run_may_begin_inside_a_storage_and_have_gaps() -> None:
    adapter = in_one_run(random_adapter("x", 4, 1), torch.bfloat16, gap=64)
    later = Adapter("later", {module: adapter.factors[module] for module in list(adapter.factors)[1:]})
    run = later.places.run
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
    assert adapter.places.run is None


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
        numbers = sources.numbers(places, at)
        gc.collect()
        assert (numbers[-1, :, : STRIDE + 1] == 0).all()
        for pair, both in zip(adapter.factors.values(), numbers[:-1].tolist(), strict=True):
            for factor, mine in zip((pair.A, pair.B), both, strict=True):
                assert torch.equal(at_address(mine[ADDRESS], mine[STRIDE], factor.shape), factor.float())
                if adapter is run:
                    assert (mine[ADDRESS] == factor.data_ptr()) == (keep_bytes == 0)


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
    arrangement = arranged(tuple(group_modules(adapters)))
    shares = torch.tensor([[1.0, -0.5, 2.0], [0.25, 3.0, 1.0], [1.0, 1.0, -1.0], [7.0, 0.5, 0.1]], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        memory = torch.empty(arrangement.size, dtype=dtype, device=device)
        wanted = torch.empty(arrangement.size, dtype=dtype)
        assert not side_by_side(arrangement, memory, adapters, shares, Sources(device, 1 << 20, adapters))
        assert not side_by_side(arrangement, wanted, adapters, shares, None)
        for index in range(len(arrangement.groups)):
            (a, b), (wanted_a, wanted_b) = arrangement.stack(memory, index), arrangement.stack(wanted, index)
            assert torch.equal(a.cpu(), wanted_a)
            assert torch.allclose(b.cpu().float(), wanted_b.float(), rtol=2 * torch.finfo(dtype).eps)
    assert side_by_side(arrangement, memory, adapters, shares * 1e6, None)
    assert not gather_stacks(arrangement, memory, adapters, Sources(device, 0))


def test_a_group_is_cut_into_the_same_pieces_every_time() -> None:
    """What is known of a piece, as where its factors lie, then is found again."""
    (group, _) = group_modules([random_adapter("x", 3, 1)])
    assert [one.modules for one in group.batches(1)] == [(module,) for module in group.modules]
    assert all(one is other for one, other in zip(group.batches(1), group.batches(1), strict=True))
    assert tuple(group.batches(len(group.modules))) == (group,)


def test_a_table_is_numbers_and_what_a_piece_is_multiplied_with() -> None:
    """B with its scaling and the weight of its module and adapter, A with neither; in the order of the sources' dtypes."""
    x, y = random_adapter("x", 3, 1), random_adapter("y", 5, 2)
    halved = map_factors(x, lambda f: LoraFactors(f.A.half(), f.B, f.scaling))
    for first, dtypes in ((x, [torch.float32]), (halved, [torch.float16, torch.float32])):
        arrangement = arranged(tuple(group_modules([first, y])))
        pieces = pieces_of(arrangement, [first.places, y.places], Sources(CPU, 0))
        assert [dtype for dtype, _, _ in pieces.launches] == dtypes
        table = pieces.table(CPU)
        assert pieces.table(CPU) is table
        numbers, weight_of, scaling = table[: -2 * pieces.count], *table[-2 * pieces.count :].view(2, -1)
        assert torch.equal(numbers, torch.from_numpy(pieces.numbers.ravel()))
        told = zip(weight_of.tolist(), scaling.view(torch.float64).tolist(), strict=True)
        found = dict(zip(numbers[: pieces.count].tolist(), told, strict=True))
        modules = [module for group in arrangement.groups for module in group.modules]
        for m, module in enumerate(modules):
            for index, adapter in enumerate((first, y)):
                pair = adapter.factors[module]
                assert found[pair.A.data_ptr()] == (-1, 1.0)
                assert found[pair.B.data_ptr()] == (2 * m + index, pair.scaling)


def test_slices_of_one_tensor_are_joined_without_a_copy() -> None:
    """And nothing else is taken for them: another order, a gap, another tensor, other columns."""
    whole = torch.arange(60.0).view(6, 2, 5)
    for given in (whole, whole.mT, whole[:, 1], whole[:, :1, 2:], whole[0, 0, :1].expand(6, -1)):
        found = rejoined([given[:1], given[1:4], given[4:]])
        assert torch.equal(found, given)
        assert found.data_ptr() == given.data_ptr()
        assert found.stride() == given.stride()
    for parts in (
        [whole[2:], whole[:2]],
        [whole[:2], whole[3:]],
        [whole[:3], whole[3:].clone()],
        [whole[:3, :, :4], whole[3:, :, 1:]],
        [whole[:0], whole],
    ):
        found = rejoined(parts)
        assert torch.equal(found, torch.cat(parts))
        assert found.data_ptr() != parts[0].data_ptr() or not len(parts[0])
