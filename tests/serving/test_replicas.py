# SPDX-License-Identifier: Apache-2.0
"""Replicas that share a disk tier merge an artifact once, and one that joins merges nothing."""

import asyncio
import threading
import time
from pathlib import Path

import fsspec
import pytest

from tests.serving.scraping import scraped, total
from tests.serving.test_worker import digest, merges, prepare, serve, talk, until, written  # noqa: F401
from vllm_merge.serving.control.control import ControlError, WorkerLink
from vllm_merge.serving.memory import reservations, tiers
from vllm_merge.serving.memory.disk_tier import DiskTier
from vllm_merge.serving.memory.reservations import Reservations


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Looks often. What a test wants to be over soon it makes so itself."""
    monkeypatch.setattr(reservations, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(reservations, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(reservations, "ANSWER_SECONDS", 60.0)


def both(first, second, scenario) -> None:
    async def run():
        links = [WorkerLink(service._server.path, lambda event: None) for service in (first, second)]
        for link in links:
            await link.connect()
        try:
            await asyncio.wait_for(scenario(*links), 240)
        finally:
            for link in links:
                await link.close()

    asyncio.run(run())


def test_two_replicas_asked_for_one_artifact_merge_it_once(serve, merges, tmp_path):  # noqa: F811
    one, two = serve(disk=tmp_path), serve()
    merges.go.clear()

    async def scenario(first, second):
        asked = [asyncio.create_task(prepare(link, "a")) for link in (first, second)]
        await until(
            lambda: merges.started and {job.status for s in (one, two) for job in s._making.jobs.values()} == MERGING
        )
        merges.go.set()
        tiers = sorted([(await reply)["tier"] for reply in asked])
        assert tiers == ["disk", "merge"]
        assert merges.started == ["a"]
        assert (
            one._merging.merges + two._merging.merges,
            one._tiers.merged_elsewhere + two._tiers.merged_elsewhere,
        ) == (1, 1)

    both(one, two, scenario)
    assert one.store.peek(digest("a")).tensors_sha256 == two.store.peek(digest("a")).tensors_sha256
    assert not list((tmp_path / ".merging").iterdir()), "nothing is left behind"


MERGING = {"merging", "elsewhere"}


def test_a_merge_that_fails_frees_the_other_replica_to_try(serve, merges, tmp_path):  # noqa: F811
    one, two = serve(disk=tmp_path), serve()
    merges.go.clear()

    async def scenario(first, second):
        asked = [asyncio.create_task(prepare(link, "wrong")) for link in (first, second)]
        await until(lambda: {job.status for s in (one, two) for job in s._making.jobs.values()} == MERGING)
        merges.go.set()
        for reply in asked:
            with pytest.raises(ControlError, match="it cannot be merged"):
                await reply
        assert merges.started == ["wrong", "wrong"], "each replica can say for itself what is wrong"

    both(one, two, scenario)


def test_a_cancelled_merge_frees_the_other_replica(serve, merges, tmp_path):  # noqa: F811
    one, two = serve(disk=tmp_path), serve()
    merges.go.clear()

    async def scenario(first, second):
        mine = asyncio.create_task(prepare(first, "a"))
        await until(lambda: merges.started == ["a"])
        other = asyncio.create_task(prepare(second, "a"))
        await until(lambda: [job.status for job in two._making.jobs.values()] == ["elsewhere"])
        assert (await first.call("cancel", digest=digest("a")))["cancelled"]
        with pytest.raises(ControlError, match="cancelled"):
            await mine
        await until(lambda: merges.started == ["a", "a"])
        merges.go.set()
        assert (await other)["tier"] == "merge"

    both(one, two, scenario)


def test_who_waits_for_another_replica_can_be_cancelled_and_holds_nobody_up(serve, merges, tmp_path):  # noqa: F811
    one, two = serve(disk=tmp_path), serve()
    merges.go.clear()

    async def scenario(first, second):
        mine = asyncio.create_task(prepare(first, "a"))
        await until(lambda: merges.started == ["a"])
        other = asyncio.create_task(prepare(second, "a"))
        await until(lambda: [job.status for job in two._making.jobs.values()] == ["elsewhere"])
        another = asyncio.create_task(prepare(second, "b"))
        await until(lambda: merges.started == ["a", "b"])  # its line goes on meanwhile
        assert (await second.call("cancel", digest=digest("a")))["cancelled"]
        with pytest.raises(ControlError, match="cancelled"):
            await other
        merges.go.set()
        assert {(await mine)["tier"], (await another)["tier"]} == {"merge"}

    both(one, two, scenario)


def test_a_place_that_hangs_is_not_waited_for(serve, merges, tmp_path, monkeypatch, caplog):  # noqa: F811
    one, two = serve(disk=tmp_path), serve()
    merges.go.clear()
    answers = threading.Event()

    async def scenario(first, second):
        mine = asyncio.create_task(prepare(first, "a"))
        await until(lambda: merges.started == ["a"])
        other = asyncio.create_task(prepare(second, "a"))
        await until(lambda: [job.status for job in two._making.jobs.values()] == ["elsewhere"])
        for module, name in (
            (reservations, "STALE_SECONDS"),
            (reservations, "ANSWER_SECONDS"),
            (tiers, "DISK_SECONDS"),
        ):
            monkeypatch.setattr(module, name, 0.05)
        disk, reserved = two._tiers._disk, two._tiers._reservations
        for name in ("holds", "read"):
            monkeypatch.setattr(disk, name, lambda digest: answers.wait() and None)
        begun, read = iter([True]), reserved._read  # a look that has begun may still be waited for as long as before
        monkeypatch.setattr(
            reserved, "_read", lambda digest: read(digest) if next(begun, None) else answers.wait() and b""
        )
        await until(lambda: merges.started == ["a", "a"])
        merges.go.set()
        assert {(await mine)["tier"], (await other)["tier"]} == {"merge"}
        assert (await prepare(second, "b"))["tier"] == "merge"

    try:
        both(one, two, scenario)
    finally:
        answers.set()
    assert f"could not be read from {tmp_path}: " in caplog.text
    assert two._tiers.disk_errors >= 2


def test_workers_of_one_server_do_not_wait_for_each_other(tmp_path):
    """Every tensor-parallel rank merges by itself."""
    tier = DiskTier(str(tmp_path), 1 << 20)
    ranks = [tier.reservations("host:/run/server-1") for _ in range(2)]
    stranger = tier.reservations("host:/run/server-2")
    assert [rank.take(digest("a")) for rank in ranks] == [True, True]
    assert not stranger.take(digest("a"))
    ranks[0].release(digest("a"))
    ranks[0].settle()
    assert stranger.take(digest("a"))


def test_a_replica_that_died_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reservations, "STALE_SECONDS", 0.1)
    tier = DiskTier(str(tmp_path), 1 << 20)
    assert tier.reservations("dead").take(digest("a"))  # and never starts to show signs of life
    alive, over = tier.reservations("alive"), []
    alive.start()
    assert not alive.take(digest("a"))
    alive.await_other(digest("a"), lambda: over.append("a"))
    wait_for(lambda: over == ["a"])
    assert alive.take(digest("a"))


def test_a_replica_that_lives_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(reservations, "STALE_SECONDS", 3600.0)
    monkeypatch.setattr(reservations, "PATIENCE_SECONDS", 0.5)
    tier = DiskTier(str(tmp_path), 1 << 20)
    slow, other, over = tier.reservations("slow"), tier.reservations("other"), []
    slow.start()
    other.start()
    assert slow.take(digest("a"))
    first = (tmp_path / ".merging" / digest("a")).read_bytes()
    wait_for(lambda: (tmp_path / ".merging" / digest("a")).read_bytes() not in (first, b""))  # signs of life
    assert not other.take(digest("a"))
    other.await_other(digest("a"), lambda: over.append("a"))
    wait_for(lambda: over == ["a"])
    assert other.take(digest("a")), "it merges as well, without a reservation"
    assert not other.take(digest("a")), "this once"


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
def test_a_place_that_fails_or_hangs_costs_a_merge_at_most(tmp_path, monkeypatch, trouble):
    monkeypatch.setattr(reservations, "ANSWER_SECONDS", 0.05)
    released = threading.Event()

    class Broken:
        def pipe_file(self, path, value, mode="overwrite"):
            if trouble == "fails":
                raise OSError("the bucket is gone")
            released.wait()

        def rm_file(self, path):
            raise FileNotFoundError

    found = Reservations(Broken(), "bucket/merges", local=False, owner="me")
    assert found.take(digest("a"))
    assert found.take(digest("b"))
    assert found.errors >= 1
    released.set()


def test_a_reservation_that_comes_too_late_is_given_back(tmp_path, monkeypatch):
    """The merge has begun without it, and so nothing would ever release it: all other replicas would wait for it."""
    monkeypatch.setattr(reservations, "ANSWER_SECONDS", 0.05)
    tier = DiskTier(str(tmp_path), 1 << 20)
    slow, other = tier.reservations("slow"), tier.reservations("other")
    go = threading.Event()
    create = slow._create
    monkeypatch.setattr(slow, "_create", lambda digest: go.wait() and create(digest))
    assert slow.take(digest("a")), "it merges as well"
    go.set()
    slow.settle()
    monkeypatch.setattr(reservations, "ANSWER_SECONDS", 60.0)
    assert other.take(digest("a"))


def test_object_stores_reserve_by_exclusive_creation():
    """The `memory` file system stands for a store whose package creates by a condition."""
    place = f"memory://reserved-{time.monotonic_ns()}"
    tier = DiskTier(place, 1 << 20)
    mine, other = tier.reservations("mine"), tier.reservations("other")
    assert mine.take(digest("a"))
    assert not other.take(digest("a"))
    mine.release(digest("a"))
    mine.settle()
    assert other.take(digest("a"))
    fsspec.filesystem("memory").rm(place.removeprefix("memory:/"), recursive=True)


def test_a_replica_that_joins_merges_nothing(serve, merges, tmp_path):  # noqa: F811
    """Its own service, its own folder of sockets: all it shares is the disk."""
    names = ["a", "b", "c"]
    first = serve(disk=tmp_path)

    async def fill(link):
        for name in names:
            await prepare(link, name)
        await written(first, tmp_path, *names)

    talk(first, fill)
    joined = serve()

    async def ask(link):
        assert {(await prepare(link, name))["tier"] for name in names} == {"disk"}

    talk(joined, ask)
    assert merges.started == names
    assert joined._merging.merges == 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.full
def test_a_real_server_that_joins_serves_from_the_shared_disk(tmp_path):
    """A second server with the same files and the same disk starts without a merge, and its first answers are the first's."""
    import json
    import urllib.request

    from tests.conftest import CONFIG, DEMO, servers

    def ask(server, model: str) -> str:
        body = json.dumps({"model": model, "prompt": "upper: stone ->", "max_tokens": 8, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.loads(reply.read())["choices"][0]["text"]

    command = servers.merge_serve(DEMO / "model", CONFIG, "--max-loras", "4", "--max-lora-rank", "64")
    environment = {"VLLM_MERGE_DISK": str(tmp_path / "merges")}
    with servers.running(command, environment) as server:
        first = {model: ask(server, model) for model in ("linear", "weighted")}
        found = scraped(server)
        merged = total(found, "vllm_merge_merges_total", outcome="done")
        assert merged > 0
        wait_for(lambda: len(list(Path(tmp_path / "merges").glob("*/artifact.json"))) >= merged)
    with servers.running(command, environment) as server:
        assert {model: ask(server, model) for model in first} == first
        found = scraped(server)
        assert total(found, "vllm_merge_merges_total") == 0
        assert total(found, "vllm_merge_artifact_lookups_total", tier="disk") == merged
