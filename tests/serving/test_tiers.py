# SPDX-License-Identifier: Apache-2.0
"""Host memory and disk beneath the cache: what goes in comes out byte for byte, within its bytes, or not at all."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import torch
from peft import LoraConfig

from vllm_merge.adapters.factors import LoraFactors, factors_sha256
from vllm_merge.adapters.peft import read_adapter
from vllm_merge.errors import UserInputError
from vllm_merge.serving.memory import disk_tier
from vllm_merge.serving.memory import packed as packed_module
from vllm_merge.serving.memory import tiers as tiers_module
from vllm_merge.serving.memory.arena import Arena
from vllm_merge.serving.memory.disk_tier import DiskTier
from vllm_merge.serving.memory.holes import ALIGN
from vllm_merge.serving.memory.host_tier import HostTier
from vllm_merge.serving.memory.packed import Packed
from vllm_merge.serving.memory.residency import ArtifactStore, ResidentArtifact
from vllm_merge.serving.memory.slots import flat_copy
from vllm_merge.serving.memory.tiers import Tiers
from vllm_merge.serving.settings import ADMIN_TOKEN_VARIABLE, DISK_VARIABLE, NUMBERS, WorkerSettings

CPU = torch.device("cpu")


def digest(name: str) -> str:
    return name.encode().hex().ljust(64, "0")


def artifact(name: str, dtype: torch.dtype = torch.bfloat16, rank: int = 4) -> ResidentArtifact:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    pairs = {
        f"model.layers.{i}.q_proj": (
            torch.randn(rank, 33, generator=generator),
            torch.randn(17, rank, generator=generator),
        )
        for i in range(2)
    }
    storage, factors = flat_copy(pairs, CPU, dtype)
    sha = factors_sha256({module: LoraFactors(a, b) for module, (a, b) in factors.items()})
    return ResidentArtifact(digest(name), f"{name}@{digest(name)[:12]}", storage, factors, None, sha, 0.5)


SIZE = Packed.of(artifact("x")).nbytes


def equal(factors, original: ResidentArtifact) -> bool:
    return set(factors) == set(original.factors) and all(
        torch.equal(got, want)
        for module in factors
        for got, want in zip(factors[module], original.factors[module], strict=True)
    )


def embedding(name: str) -> ResidentArtifact:
    """An artifact with an embedding beside a linear layer."""
    made = artifact(name)
    pairs = {"model.embed_tokens": (torch.randn(2, 40), torch.randn(33, 2)), **made.factors}
    storage, factors = flat_copy(pairs, CPU, torch.bfloat16)
    sha = factors_sha256({module: LoraFactors(a, b) for module, (a, b) in factors.items()})
    embeddings = frozenset({"model.embed_tokens"})
    return replace(made, storage=storage, factors=factors, tensors_sha256=sha, embeddings=embeddings)


def test_an_embedding_stays_one_in_every_tier(tmp_path):
    original = embedding("a")
    host, disk = HostTier(1 << 20, CPU), DiskTier(str(tmp_path / "disk"), 1 << 20)
    host.put(Packed.of(original))
    with host.borrow(original.digest) as packed:
        assert packed.embeddings == original.embeddings
        disk.write(packed)
    stored = disk.read(original.digest)
    assert equal(stored.factors(), original)
    assert stored.embeddings == original.embeddings
    read = read_adapter(tmp_path / "disk" / original.digest)
    assert {module for module, pair in read.factors.items() if pair.embedding} == original.embeddings


# -- host memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_host_memory_gives_back_the_same_tensors(dtype, monkeypatch):
    monkeypatch.setattr(packed_module, "PIECE_BYTES", 1000)
    host, original = HostTier(1 << 20, CPU), artifact("a", dtype)
    assert host.put(Packed.of(original))
    with host.borrow(original.digest) as packed:
        assert packed.data.data_ptr() != original.storage.data_ptr()
        assert equal(packed.factors(), original)
        assert (packed.name, packed.tensors_sha256, packed.seconds) == (original.name, original.tensors_sha256, 0.5)
    with host.borrow(digest("nobody")) as nothing:
        assert nothing is None


def test_host_memory_stays_within_its_block_and_lets_the_least_recently_used_go():
    host = HostTier(3 * SIZE + 2 * ALIGN, CPU)
    originals = {name: artifact(name) for name in "abcd"}
    for name in "abc":
        host.put(Packed.of(originals[name]))
    with host.borrow(digest("a")):
        pass  # now b is the oldest
    host.put(Packed.of(originals["d"]))
    assert [host.holds(digest(name)) for name in "abcd"] == [True, False, True, True]
    assert host.describe()["bytes"] == 3 * SIZE <= host.budget_bytes
    for name in "acd":
        with host.borrow(digest(name)) as packed:
            assert equal(packed.factors(), originals[name]), "nothing was written over"


def test_host_memory_makes_room_for_a_large_one_and_refuses_what_is_larger_than_all_of_it():
    host = HostTier(3 * SIZE, CPU)
    for name in "ab":
        host.put(Packed.of(artifact(name)))
    large = artifact("large", rank=8)
    assert host.put(Packed.of(large))
    with host.borrow(large.digest) as packed:
        assert equal(packed.factors(), large)
    assert not host.put(Packed.of(artifact("giant", rank=32)))
    assert host.holds(large.digest), "nothing went in vain"


def test_what_is_borrowed_is_not_written_over():
    host, first = HostTier(SIZE, CPU), artifact("a")
    host.put(Packed.of(first))
    with host.borrow(first.digest) as packed:
        assert not host.put(Packed.of(artifact("b")))
        assert equal(packed.factors(), first)
    assert host.put(Packed.of(artifact("b")))


# -- disk ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    if request.param == "folder":
        yield str(tmp_path / "merges")
        return
    url = f"memory://{tmp_path.name}"
    yield url
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def test_the_disk_gives_back_the_same_tensors_to_another_replica(place):
    original = artifact("a")
    assert DiskTier(place, 1 << 20).write(Packed.of(original))
    stored = DiskTier(place, 1 << 20).read(original.digest)
    assert equal(stored.factors(), original)
    assert (stored.tensors_sha256, stored.seconds) == (original.tensors_sha256, 0.5)
    assert DiskTier(place, 1 << 20).read(digest("nobody")) is None


def test_an_entry_is_a_peft_folder(tmp_path):
    original = artifact("a", torch.float32)
    DiskTier(str(tmp_path), 1 << 20).write(Packed.of(original))
    folder = tmp_path / original.digest
    assert LoraConfig.from_pretrained(folder).r == 4
    assert equal({m: (f.A, f.B) for m, f in read_adapter(folder).factors.items()}, original)
    assert sorted(path.name for path in tmp_path.iterdir()) == [original.digest], "nothing temporary is left"


def damage(place: str, file: str, change) -> None:
    fs, root = fsspec.core.url_to_fs(place)
    path = f"{root}/{digest('a')}/{file}"
    content = change(fs.cat_file(path))
    if content is None:
        fs.rm(path)
    else:
        fs.pipe_file(path, content)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("adapter_model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("adapter_model.safetensors", lambda data: data[: len(data) // 2]),
        ("adapter_model.safetensors", lambda data: b""),
        ("adapter_model.safetensors", lambda data: None),
        ("artifact.json", lambda data: b"{"),
        ("artifact.json", lambda data: b"[]"),
        ("artifact.json", lambda data: data.replace(b'"tensors_sha256": "', b'"tensors_sha256": "0')),
        ("artifact.json", lambda data: json.dumps({**json.loads(data), "digest": digest("b")}).encode()),
    ],
    ids=["bit", "half", "empty", "gone", "record", "other json", "hash", "digest"],
)
def test_a_damaged_entry_is_removed_and_said_and_can_be_written_again(place, file, change, caplog):
    disk, original = DiskTier(place, 1 << 20), artifact("a")
    disk.write(Packed.of(original))
    damage(place, file, change)
    with caplog.at_level("ERROR", logger="vllm_merge.disk"):
        assert disk.read(original.digest) is None
    assert f"{original.digest} is damaged and is removed" in caplog.text
    assert not disk.holds(original.digest)
    disk.write(Packed.of(original))
    assert equal(disk.read(original.digest).factors(), original)


def test_the_disk_stays_within_its_bytes_and_lets_the_least_recently_used_go(place):
    probe = DiskTier(place, 1 << 20)
    probe.write(Packed.of(artifact("a")))
    entry = probe.bytes
    disk = DiskTier(place, int(3.5 * entry))
    for name in "bc":
        time.sleep(0.01)
        disk.write(Packed.of(artifact(name)))
    time.sleep(0.01)
    assert probe.read(digest("a")) is not None, "a use by another replica counts"
    time.sleep(0.01)
    disk.write(Packed.of(artifact("d")))
    assert [disk.holds(digest(name)) for name in "abcd"] == [True, False, True, True]
    assert disk.bytes <= disk.budget_bytes
    assert not DiskTier(place, SIZE - 1).write(Packed.of(artifact("e")))


def test_where_the_disk_is_is_not_told(place):
    disk = DiskTier(place, 1 << 20)
    disk.write(Packed.of(artifact("a")))
    assert set(disk.describe()) == {"bytes", "budget_bytes", "evicted"}


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    disk = DiskTier(str(tmp_path), 1 << 20)

    def fails(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_tier, "write_adapter", fails)
    with pytest.raises(OSError, match="No space left"):
        disk.write(Packed.of(artifact("a")))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_goes_in_time(tmp_path, monkeypatch):
    left = tmp_path / f".{digest('a')}.xyz"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    disk = DiskTier(str(tmp_path), 1 << 20)
    assert disk.read(digest("a")) is None
    disk.write(Packed.of(artifact("b")))
    assert left.exists(), "it may still be written"
    old = time.time() - 2 * disk_tier.ABANDONED_SECONDS
    os.utime(left / "adapter_model.safetensors", (old, old))
    disk.write(Packed.of(artifact("c")))
    assert not left.exists()


# -- both ---------------------------------------------------------------------------------------------------------------


def settings(**changes) -> WorkerSettings:
    environment = {f"VLLM_MERGE_{name.upper()}": str(value) for name, value in changes.items()}
    return WorkerSettings.read(environment)


def origin(tiers: Tiers, name: str) -> str | None:
    with tiers.fetch(digest(name)) as found:
        return found[0] if found is not None else None


def test_what_the_disk_has_is_told_to_be_in_use_and_nothing_piles_up(tmp_path):
    tiers, original = Tiers(settings(disk=tmp_path), CPU), artifact("a")
    tiers.start()
    tiers.store(original)
    tiers.wait()
    used = tmp_path / digest("a") / "used"
    used.write_text("1.0")
    for _ in range(1000):
        tiers.store(original)
    assert tiers._writes.qsize() <= 1, "however often it leaves the cache"
    tiers.wait()
    assert float(used.read_text()) > 1.0
    assert (tiers._used, tiers._waiting) == (set(), {})


def test_an_artifact_that_cannot_be_copied_for_the_disk_is_offered_again(tmp_path, monkeypatch):
    tiers, original = Tiers(settings(disk=tmp_path), CPU), artifact("a")
    tiers.start()

    def fails(*arguments, **options):
        raise RuntimeError("cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", fails)
        with pytest.raises(RuntimeError, match="cannot allocate"):
            tiers.store(original)
    tiers.store(original)
    tiers.wait()
    assert DiskTier(str(tmp_path), 1 << 20).holds(digest("a"))


def test_a_full_or_read_only_disk_is_read_all_the_same(tmp_path, monkeypatch):
    disk, original = DiskTier(str(tmp_path), 1 << 20), artifact("a")
    disk.write(Packed.of(original))

    def fails(path, *arguments, **options):
        Path(path).write_bytes(b"")  # a file that is opened to be written is empty first
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk._fs, "pipe_file", fails)
    assert equal(disk.read(original.digest).factors(), original)
    assert disk._last_used(original.digest) > 1e9, "it was used just now, although that could not be written down"


def test_an_evicted_artifact_comes_back_from_the_nearest_tier(tmp_path):
    tiers = Tiers(settings(host_bytes=SIZE, disk=tmp_path), CPU)
    tiers.start()
    originals = {name: artifact(name) for name in "ab"}
    for name in "ab":
        tiers.demote(originals[name])
    tiers.wait()
    assert (origin(tiers, "a"), origin(tiers, "b"), origin(tiers, "c")) == ("disk", "host", None)
    with tiers.fetch(digest("a")) as (_, stored):
        assert equal(stored.factors(), originals["a"])
    assert tiers.near(digest("b"))
    assert not tiers.near(digest("a"))
    facts = tiers.describe()
    assert facts["host"]["bytes"] == SIZE
    assert str(tmp_path) not in str(facts)
    assert facts["disk"]["bytes"] > 2 * SIZE


def test_a_slow_disk_costs_neither_memory_nor_time(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(tiers_module, "WAITING_BYTES", 2 * SIZE)
    tiers = Tiers(settings(disk=tmp_path), CPU)  # nothing is written: its thread was not started
    for name in "ababc":
        tiers.store(artifact(name))
    assert caplog.text.count("was not stored") == 1


def test_a_disk_that_fails_is_said_and_nothing_else(tmp_path, caplog):
    tiers = Tiers(settings(disk=tmp_path / "merges"), CPU)
    tiers.start()
    (tmp_path / "merges").rmdir()
    (tmp_path / "merges").write_text("a file")
    tiers.store(artifact("a"))
    tiers.wait()
    assert "could not be stored" in caplog.text
    assert origin(tiers, "a") is None


def test_no_tier_is_made_that_nobody_asked_for(tmp_path):
    assert not Tiers(settings(), CPU).any, "on the CPU the cache is host memory already"
    assert settings().host_bytes_on("cuda") == 4 << 30
    assert settings(host_bytes=0).host_bytes_on("cuda") == 0


def test_a_small_gpu_gets_a_small_workspace():
    found = [settings().workspace_bytes_on(total) for total in (None, 80 << 30, 24 << 30, 1 << 30)]
    assert found == [2 << 30, 2 << 30, (24 << 30) // 40, 64 << 20]
    assert settings(workspace_bytes=3 << 30).workspace_bytes_on(24 << 30) == 3 << 30


def test_a_disk_that_is_none_is_refused():
    with pytest.raises(UserInputError, match="VLLM_MERGE_DISK=nowhere://x cannot be used"):
        Tiers(settings(disk="nowhere://x"), CPU)


@pytest.mark.parametrize("value", ["4GB", "-1", "1.5", ""])
def test_wrong_numbers_name_their_variable(value):
    with pytest.raises(UserInputError, match=r"VLLM_MERGE_QUEUE is .*; give a whole number of at least 1"):
        settings(queue=value)


@pytest.mark.parametrize(("name", "least"), [("cache_bytes", 1), ("host_bytes", 0), ("workspace_bytes", 64 << 20)])
def test_wrong_sizes_say_that_they_are_in_bytes(name, least):
    said = rf"VLLM_MERGE_{name.upper()} is '4GB'; give a whole number of bytes, of at least {least}, or unset it"
    with pytest.raises(UserInputError, match=said):
        settings(**{name: "4GB"})


def test_every_variable_is_in_the_documentation():
    text = Path(__file__).parents[2].joinpath("docs/operations.md").read_text()
    for variable in (*NUMBERS, DISK_VARIABLE, ADMIN_TOKEN_VARIABLE):
        assert f"| `{variable}` |" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_is_allocated_or_pinned_after_the_start(tmp_path):
    device, size = torch.device("cuda", torch.cuda.current_device()), 64 << 20
    tiers = Tiers(settings(host_bytes=4 * size, disk=tmp_path), device)
    tiers.start()
    arena = Arena(device, 4 * size)
    store = ArtifactStore(2 * size, demote=tiers.demote)

    def place(name: str, pairs, sha: str = "") -> ResidentArtifact:
        with arena.use(), store.admission:
            store.make_room(name, size)
            storage, factors = flat_copy(pairs, device, torch.bfloat16)
            made = ResidentArtifact(digest(name), name, storage, factors, None, sha, 0.0)
            arena._stream.synchronize()
            store.insert(made)
        return made

    def merged(name: str):
        value = float(ord(name))
        a = torch.full((64, size // 4 // 64), value, dtype=torch.bfloat16)
        return {"m": (a, a.T.contiguous())}

    for name in "abcd":
        place(name, merged(name))
    with arena.use():
        before = torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.host_memory_stats()["num_host_alloc"]
    for name in "abcd" * 5:
        with tiers.fetch(digest(name)) as (tier, content):
            assert tier == "host"
            place(name, content.factors())
        artifact = store.peek(digest(name))
        assert equal(
            {m: (a.cpu(), b.cpu()) for m, (a, b) in artifact.factors.items()}, SimpleNamespace(factors=merged(name))
        )
        del artifact
        assert store.describe()["bytes"] <= 2 * size
    assert before == (torch.cuda.memory_stats()["num_device_alloc"], torch.cuda.host_memory_stats()["num_host_alloc"])
