# SPDX-License-Identifier: Apache-2.0
"""The adapters that a worker keeps in host memory: read once, within the block, never another content than was planned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from vllm_merge.adapters import peft
from vllm_merge.adapters.factors import Adapter
from vllm_merge.adapters.peft import WEIGHTS_FILE, hash_adapter, read_adapter, size_of
from vllm_merge.errors import MergeCancelled, UserInputError
from vllm_merge.recipe.plan import Plan, PlannedAdapter
from vllm_merge.serving.memory import sources as sources_module
from vllm_merge.serving.memory.holes import ALIGN
from vllm_merge.serving.memory.sources import SourceCache

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Write the PEFT folder of this name: rank 4, one module, whatever else a seed changes."""

    def write(name: str, seed: int = 0, d_in: int = 64) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": torch.randn(4, d_in, generator=generator),
            f"{module}.lora_B.weight": torch.randn(32, 4, generator=generator),
        }
        save_file(tensors, path / WEIGHTS_FILE)
        return path

    return write


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters that were read from files, in any order."""
    seen: list[str] = []
    read_bytes = peft.read_bytes

    def counting(path: str, name: str, **options: object) -> peft.ReadAdapter:
        seen.append(name)
        return read_bytes(path, name, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sources_module, "read_bytes", counting)
    monkeypatch.setattr(sources_module, "REST_SECONDS", 0.0)
    return seen


def planned(*folders: Path) -> Plan:
    """A plan of these adapters, as far as sources look at it."""
    found = {
        path.name: PlannedAdapter(name=path.name, path=str(path), content_hash=hash_adapter(path)) for path in folders
    }
    return SimpleNamespace(adapters=found)  # type: ignore[return-value]


def fetched(cache: SourceCache, plan: Plan) -> Mapping[str, Adapter]:
    """Fetch, take every adapter, let go."""
    cache.fetch(plan, lambda: None)
    adapters = {name: cache.load(one) for name, one in plan.adapters.items()}
    cache.done()
    return adapters


def same(adapter: Adapter, path: Path) -> bool:
    """Whether an adapter is what the folder holds."""
    on_disk = read_adapter(path)
    return adapter.content_hash == on_disk.content_hash and all(
        torch.equal(pair.A, on_disk.factors[module].A)
        and torch.equal(pair.B, on_disk.factors[module].B)
        and pair.scaling == on_disk.factors[module].scaling
        for module, pair in adapter.factors.items()
    )


def room_for(path: Path, count: int) -> int:
    """Bytes of a block for so many adapters like this one."""
    return -(-size_of(path) // ALIGN) * ALIGN * count


def test_what_was_read_is_read_no_more(folder, reads):
    a, b, c = folder("a"), folder("b"), folder("c")
    cache = SourceCache(1 << 20, CPU)
    first = fetched(cache, planned(a, b))
    second = fetched(cache, planned(b, c))
    assert sorted(reads) == ["a", "b", "c"]
    assert same(first["a"], a)
    assert same(second["b"], b)
    assert same(second["c"], c)


def test_one_content_under_two_names_is_read_once(folder, reads):
    a = folder("a")
    plan = planned(a)
    plan.adapters["other"] = PlannedAdapter(name="other", path=str(a), content_hash=hash_adapter(a))
    adapters = fetched(SourceCache(1 << 20, CPU), plan)
    assert len(reads) == 1
    assert {name: adapter.name for name, adapter in adapters.items()} == {"a": "a", "other": "other"}
    assert same(adapters["other"], a)


def test_the_least_recently_used_leaves_the_block_first(folder, reads):
    a, b, c = folder("a"), folder("b"), folder("c")
    cache = SourceCache(room_for(a, 2), CPU)
    for plan in (planned(a), planned(b), planned(a), planned(c)):  # b has waited longest when c needs room
        fetched(cache, plan)
    assert reads == ["a", "b", "c"]
    fetched(cache, planned(a))
    assert reads == ["a", "b", "c"], "a was used after b"
    assert same(fetched(cache, planned(b))["b"], b)
    assert reads == ["a", "b", "c", "b"]


def test_everything_that_is_kept_lies_in_the_block_at_aligned_places_of_its_own(folder, reads):
    paths = [folder(name, d_in=width) for name, width in (("a", 64), ("b", 70), ("c", 33), ("d", 128))]
    cache = SourceCache(room_for(paths[3], 3), CPU)
    block = cache._block
    for first in paths:
        for second in paths:
            for name, adapter in fetched(cache, planned(first, second)).items():
                assert same(adapter, first.parent / name)
            spans = sorted((kept.start, kept.stop) for kept in cache._kept.values())
            assert all(start % ALIGN == 0 and stop <= block.numel() for start, stop in spans)
            assert all(before[1] <= after[0] for before, after in pairwise(spans))
    for kept in cache._kept.values():
        (pair,) = kept.adapter.factors.values()
        assert block.data_ptr() + kept.start <= pair.A.data_ptr() < block.data_ptr() + kept.stop


@pytest.mark.parametrize("budget", [0, 100])
def test_without_room_a_merge_reads_and_keeps_nothing(folder, reads, budget):
    a, b = folder("a"), folder("b")
    cache = SourceCache(budget, CPU)
    for _ in range(2):
        adapters = fetched(cache, planned(a, b))
        assert same(adapters["a"], a)
        assert same(adapters["b"], b)
    assert sorted(reads) == ["a", "a", "b", "b"]
    assert not cache._kept


def test_a_plan_larger_than_the_block_keeps_what_fits(folder, reads):
    a, b, c = folder("a"), folder("b"), folder("c")
    cache = SourceCache(room_for(a, 2), CPU)
    adapters = fetched(cache, planned(a, b, c))
    assert all(same(adapters[path.name], path) for path in (a, b, c))
    assert len(cache._kept) == 2
    fetched(cache, planned(a, b, c))
    assert len(reads) == 4, "two were there, one was not"


def test_files_that_were_swapped_since_they_were_planned_are_refused(folder, reads):
    a, b = folder("a"), folder("b")
    cache = SourceCache(1 << 20, CPU)
    plan = planned(a, b)
    folder("b", seed=1)
    with pytest.raises(UserInputError, match=r"adapter 'b' .*the content changed since it was registered"):
        cache.fetch(plan, lambda: None)
    cache.done()
    assert plan.adapters["b"].content_hash not in cache._kept
    assert same(fetched(cache, planned(a, b))["b"], b), "planned anew it is what the files hold now"


def test_what_is_in_memory_stays_what_was_planned(folder, reads):
    """A hash names a content; the files behind it may go."""
    a = folder("a")
    plan = planned(a)
    cache = SourceCache(1 << 20, CPU)
    before = read_adapter(a)
    fetched(cache, plan)
    folder("a", seed=5)
    found = fetched(cache, plan)["a"]
    assert found.content_hash == before.content_hash
    assert all(torch.equal(pair.A, before.factors[module].A) for module, pair in found.factors.items())


def test_a_file_that_grows_between_the_look_and_the_read(folder, reads, monkeypatch):
    """The place was sized for what it was: it is read to memory of its own, and the place is free again."""
    a, b = folder("a"), folder("b")
    monkeypatch.setattr(sources_module, "size_of", lambda path: size_of(path) - 8)
    cache = SourceCache(1 << 20, CPU)
    assert same(fetched(cache, planned(a))["a"], a)
    assert not cache._kept
    monkeypatch.undo()
    assert same(fetched(cache, planned(b))["b"], b)
    assert [kept.start for kept in cache._kept.values()] == [0]


@pytest.mark.parametrize("mishap", ["gone", "cut off", "not finite"])
def test_a_failing_read_leaves_no_reservation(folder, reads, mishap):
    a, b = folder("a"), folder("b")
    weights = b / WEIGHTS_FILE
    if mishap == "not finite":
        data = bytearray(weights.read_bytes())
        data[-4:] = b"\x00\x00\xc0\x7f"
        weights.write_bytes(data)
    plan = planned(a, b)
    if mishap == "gone":
        weights.unlink()
    elif mishap == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    cache = SourceCache(room_for(a, 2), CPU)
    with pytest.raises(UserInputError, match="adapter 'b'"):
        cache.fetch(plan, lambda: None)
    cache.done()
    assert set(cache._kept) <= {plan.adapters["a"].content_hash}
    c, d = folder("c"), folder("d")
    fetched(cache, planned(c, d))
    assert set(cache._kept) == {hash_adapter(c), hash_adapter(d)}, "the whole block can be used again"


def test_a_merge_that_is_stopped_between_two_adapters_leaves_no_reservation(folder, reads):
    paths = [folder(name) for name in "abcd"]
    plan = planned(*paths)
    cache = SourceCache(1 << 20, CPU)

    def stop() -> None:
        raise MergeCancelled("stopped")

    with pytest.raises(MergeCancelled):
        cache.fetch(plan, stop)
    cache.done()
    assert list(cache._kept) == [plan.adapters["a"].content_hash], (
        "the first was whole, the rest is as if never asked for"
    )
    adapters = fetched(cache, plan)
    assert all(same(adapters[path.name], path) for path in paths)


def test_a_read_that_cannot_begin_leaves_nothing_behind(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [folder(name) for name in "abc"]
    plan, cache = planned(*folders), SourceCache(1 << 20, CPU)
    submit, begun = cache._readers.submit, []

    def fails(*arguments: object) -> object:
        begun.append(arguments)
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        return submit(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(cache._readers, "submit", fails)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            cache.fetch(plan, lambda: None)
    assert len(begun) == 2
    assert cache.bytes == 0
    assert all(same(adapter, path) for adapter, path in zip(fetched(cache, plan).values(), folders, strict=True))


def test_readers_run_before_anything_is_read() -> None:
    cache = SourceCache(1 << 20, CPU)
    assert len(cache._readers._threads) == cache._readers._max_workers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_adapters_lie_in_pinned_memory(folder, reads):
    a = folder("a")
    adapters = fetched(SourceCache(1 << 20, torch.device("cuda")), planned(a))
    assert all(pair.A.is_pinned() and pair.B.is_pinned() for pair in adapters["a"].factors.values())
    assert same(adapters["a"], a)
