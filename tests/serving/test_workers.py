# SPDX-License-Identifier: Apache-2.0
"""Which workers an API process needs, and finding exactly those."""

import asyncio
import os
import socket
import subprocess
from types import SimpleNamespace

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.serving.control import workers
from vllm_merge.serving.control.control import ControlError, ControlServer
from vllm_merge.serving.control.workers import Place, any_worker, connect_workers, remove_dead, wanted_places


def parallel(**changed):
    """vLLM's parallel_config as the API process sees it."""
    defaults = {
        "world_size": 1,
        "data_parallel_size": 1,
        "data_parallel_size_local": 1,
        "data_parallel_rank": 0,
        "local_engines_only": False,
        "nnodes": 1,
    }
    return SimpleNamespace(**{**defaults, **changed})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [(0, 0)]),
        ({"world_size": 2}, [(0, 0), (0, 1)]),
        ({"data_parallel_size": 2, "data_parallel_size_local": 2, "world_size": 2}, [(0, 0), (0, 1), (1, 0), (1, 1)]),
        ({"data_parallel_size": 4, "data_parallel_rank": 3, "local_engines_only": True}, [(3, 0)]),
        (
            {
                "data_parallel_size": 4,
                "data_parallel_size_local": 2,
                "data_parallel_rank": 2,
                "local_engines_only": True,
            },
            [(2, 0), (3, 0)],
        ),
    ],
    ids=["one", "tensor or pipeline", "data and tensor", "external balancer", "hybrid balancer"],
)
def test_an_api_process_needs_every_rank_of_every_engine_it_talks_to(config, expected):
    assert wanted_places(parallel(**config)) == [Place(*place) for place in expected]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"nnodes": 2, "world_size": 2}, r"spreads over 2 \(--nnodes\)"),
        ({"data_parallel_size": 4, "data_parallel_size_local": 2}, r"2 of 4 engines are elsewhere.*hybrid-lb"),
    ],
)
def test_workers_on_other_machines_are_refused_at_once(config, message):
    with pytest.raises(UserInputError, match=message):
        wanted_places(parallel(**config))


HUNG = 7  # an engine whose worker takes connections and says nothing


class Worker:
    """Says where it stands, and nothing else."""

    def __init__(self, engine: int, rank: int):
        self._facts = {"engine": engine, "rank": rank, "workers": 2}

    async def handle(self, session, op, message):
        assert op == "hello"
        if self._facts["engine"] == HUNG:
            await asyncio.sleep(60)
        return self._facts

    def closed(self, session):
        pass


@pytest.fixture
def folder(tmp_path):
    """The sockets of both ranks of engine 0, of one rank of engine 1, and of a worker that is gone."""
    servers = [
        ControlServer(tmp_path / f"worker-{index}.sock", Worker(*place))
        for index, place in enumerate([(0, 1), (1, 0), (0, 0)])
    ]
    for server in servers:
        server.start()
    (tmp_path / "worker-9.sock").touch()
    yield tmp_path
    for server in servers:
        server.stop()


def test_what_killed_workers_left_is_removed_and_what_lives_is_not(tmp_path):
    """A socket whose process is gone, and nobody listens at it; one of this process; one of another container's."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead, here = (tmp_path / f"worker-{pid}-abc.sock" for pid in (ended.pid, os.getpid()))
    elsewhere = ControlServer(tmp_path / f"worker-{ended.pid}-def.sock", Worker(0, 0))
    elsewhere.start()
    for path in (dead, here, elsewhere.path):
        path.with_suffix(".alarm").touch()
    (tmp_path / f"worker-{ended.pid}-fff.alarm").touch()
    for path in (dead, here):
        with socket.socket(socket.AF_UNIX) as closed:
            closed.bind(str(path))
    try:
        remove_dead(tmp_path)
        kept = {path.with_suffix(end) for path in (here, elsewhere.path) for end in (".sock", ".alarm")}
        assert set(tmp_path.iterdir()) == kept
    finally:
        elsewhere.stop()


def connect(folder, wanted, timeout):
    async def scenario():
        links = await connect_workers(folder, wanted, lambda event: None, timeout=timeout)
        found = [(link.facts["engine"], link.facts["rank"], link.connected) for link in links]
        for link in links:
            await link.close()
        return found

    return asyncio.run(scenario())


def test_exactly_the_wanted_workers_are_found_in_order(folder):
    assert connect(folder, [Place(0, 0), Place(0, 1)], 5) == [(0, 0, True), (0, 1, True)]
    assert connect(folder, [Place(1, 0)], 5) == [(1, 0, True)]


def test_who_is_missing_is_named(folder):
    message = r"2 of 3 vLLM workers.*within 0 s: rank 1 of engine 1, rank 0 of engine 2.*--enable-lora.*other machines"
    with pytest.raises(ControlError, match=message):
        connect(folder, [Place(0, 0), Place(1, 1), Place(2, 0)], 0.3)


def test_a_worker_that_says_nothing_is_missing_like_one_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(workers, "HELLO_SECONDS", 0.1)
    hung = ControlServer(folder / "worker-7.sock", Worker(HUNG, 0))
    hung.start()
    with pytest.raises(ControlError, match=r"1 of 2 vLLM workers.*: rank 0 of engine 7"):
        connect(folder, [Place(0, 0), Place(HUNG, 0)], 0.3)
    hung.stop()


def test_a_program_without_a_config_of_vllm_learns_its_engine_from_any_worker(folder):
    assert asyncio.run(any_worker(folder, timeout=5))["workers"] == 2


def test_without_any_worker_the_cure_is_said(tmp_path):
    with pytest.raises(ControlError, match=r"rank 0 of engine 0.*VLLM_PLUGINS"):
        asyncio.run(any_worker(tmp_path, timeout=0.2))
