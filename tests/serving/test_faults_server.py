# SPDX-License-Identifier: Apache-2.0
"""Faults of a real server: what runs out, what leaves, and processes that are killed or stopped while they merge.

What is seen goes to the table of docs/architecture/faults.md, as in test_faults.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import DEMO, Control, servers
from tests.serving.fault_table import seen

pytestmark = [pytest.mark.full, pytest.mark.server]

ADAPTERS = sorted(path.name for path in (DEMO / "adapters").iterdir())
EVERYTHING = [{"adapter": name} for name in ADAPTERS]
PROMPT = "upper: stone ->"
COLD = 16
ROUNDS = 12  # of 16 merges, in which memory is watched
LONG = 120  # seconds within which something has to happen on a busy machine


def document(alias: str = "c0") -> dict[str, Any]:
    """c0 … c15: two adapters each, cold; `slow0` … take seconds to merge."""

    def pair(i: int) -> list[dict[str, Any]]:
        names, weights = (ADAPTERS[i % 8], ADAPTERS[(i + 1) % 8]), (1.0 + i / 20, 0.3)
        return [{"adapter": name, "parameters": {"weight": w}} for name, w in zip(names, weights, strict=True)]

    cold = {f"c{i}": {"merge_method": "task_arithmetic", "adapters": pair(i), "load": "lazy"} for i in range(COLD)}
    slow = {
        f"slow{i}": {
            "merge_method": "ties",
            "space": "delta",
            "adapters": EVERYTHING * 12,
            "load": "lazy",
            "rank": 64,
            "parameters": {"lambda": 1.0 + i / 10},
        }
        for i in range(4)
    }
    return {
        "version": 1,
        "adapters": {name: {"path": str(DEMO / "adapters" / name)} for name in ADAPTERS},
        "recipes": {**cold, **slow},
        "aliases": {"assistant": alias},
    }


class Running:
    """A server, its files, and a client."""

    def __init__(self, server: Any, config: Path, runtime: Path) -> None:
        self.server, self.config, self.runtime = server, config, runtime

    def ask(self, model: str, tokens: int = 6) -> tuple[int, str, tuple[float, ...]]:
        """(status, artifact, log-probabilities); status 0: the connection was closed without an answer."""
        body = {
            "model": model,
            "prompt": PROMPT,
            "max_tokens": tokens,
            "temperature": 0,
            "logprobs": 0,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=2 * LONG) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, "", ()
        except (OSError, http.client.HTTPException):
            return 0, "", ()
        return 200, answer["model"], tuple(answer["choices"][0]["logprobs"]["token_logprobs"])

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.server.url}/v1/merge/artifacts", timeout=LONG) as reply:
            (worker,) = json.load(reply)["data"]
            return worker

    def file_state(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.server.url}/v1/merge/recipes", timeout=LONG) as reply:
            return json.load(reply)["file"]

    def worker_pid(self) -> int:
        (path,) = self.runtime.glob("worker-*.sock")
        return int(path.stem.split("-")[1])

    def memory(self) -> int:
        """Bytes of the processes of this server that are resident."""
        pids = [self.server.process.pid, self.worker_pid()]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")

    def stored(self) -> list[Path]:
        """The entries of the disk tier."""
        return [path.parent for path in self.config.parent.glob("merges/*/artifact.json")]

    def open_files(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (self.server.process.pid, self.worker_pid()))


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + LONG
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def running(folder: Path, *options: str, **variables: str) -> Iterator[Running]:
    config = folder / "recipes.yaml"
    config.write_text(yaml.safe_dump(document()))
    runtime = folder / "run"  # the same for every server, as where an operator names it
    environment = {"VLLM_MERGE_RUNTIME_DIR": str(runtime), **variables}
    command = servers.merge_serve(DEMO / "model", config, "--max-loras", "2", "--max-lora-rank", "64", *options)
    with servers.running(command, environment) as server:
        yield Running(server, config, runtime)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def faulty(folder) -> Iterator[Running]:
    """A server with two slots and a disk tier."""
    with running(folder, VLLM_MERGE_DISK=str(folder / "merges")) as server:
        yield server


def same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one == pytest.approx(other, abs=1e-3)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_64_requests_for_16_cold_recipes_with_2_slots(faulty):
    names = [f"c{i % COLD}" for i in range(64)]
    answers = at_once([lambda name=name: faulty.ask(name) for name in names])
    assert {status for status, *_ in answers} == {200}
    alone = {f"c{i}": faulty.ask(f"c{i}") for i in range(COLD)}
    assert all(
        label == alone[name][1] and same(values, alone[name][2])
        for name, (_, label, values) in zip(names, answers, strict=True)
    )
    assert len({label for _, label, _ in answers}) == COLD
    assert faulty.status()["merges"] == COLD, "one merge each, however many asked"
    again = at_once([lambda name=name: faulty.ask(name) for name in names])
    assert all(same(values, alone[name][2]) for name, (_, _, values) in zip(names, again, strict=True))
    seen("64 requests for 16 cold recipes, 2 slots, over HTTP", "server", "right answer", "nothing", "right answer")


def test_clients_that_leave_while_they_wait(faulty):
    right = faulty.ask("c1")
    before_files = None
    for _ in range(2):
        connections = []
        for _ in range(20):
            connection = http.client.HTTPConnection("127.0.0.1", faulty.server.port)
            body = json.dumps({"model": "slow0", "prompt": PROMPT, "max_tokens": 1})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            connections.append(connection)
        for connection in connections:
            connection.close()
        assert same(faulty.ask("c1")[2], right[2])
        until(lambda: not faulty.status()["merging"], "the merge that nobody waits for never ended")
        until(lambda: not any(row["leases"] for row in faulty.status()["artifacts"]), "a lease stayed")
        files = faulty.open_files()
        before_files = before_files or files
    assert files <= before_files + 2
    assert faulty.ask("slow0", 1)[0] == 200
    seen("clients leave while they wait, over HTTP", "server", "none is answered", "nothing", "right answer")


def test_the_recipe_file_is_rewritten_under_load(faulty):
    right = {f"c{i}": faulty.ask(f"c{i}") for i in range(4)}
    labels = {name: label for name, (_, label, _) in right.items()}
    stop, wrong, asked = threading.Event(), [], [0]

    def load(name: str) -> None:
        while not stop.is_set():
            status, label, values = faulty.ask(name)
            asked[0] += 1
            expected = {labels[name]} if name != "assistant" else set(labels.values())
            if status != 200 or label not in expected or not same(values, right[label.partition("@")[0]][2]):
                wrong.append((name, status, label))

    threads = [threading.Thread(target=load, args=(name,)) for name in ("c0", "c1", "assistant")]
    for thread in threads:
        thread.start()
    try:
        for i in range(12):
            text = yaml.safe_dump(document(f"c{i % 4}")) + f"# {i}\n"
            before = asked[0], faulty.file_state()
            faulty.config.write_text(text if i % 3 != 2 else text[: len(text) // 2])
            if i % 2:  # else it is written again at once
                until(lambda before=before: faulty.file_state() != before[1], "the change was not seen")
            until(lambda before=before: asked[0] > before[0] + 3, "nobody was answered")
        faulty.config.write_text(yaml.safe_dump(document("c3")))
        until(lambda: faulty.ask("assistant")[1] == labels["c3"], "the last file was never served")
    finally:
        stop.set()
        for thread in threads:
            thread.join(LONG)
    assert wrong == []
    seen(
        "the recipe file is rewritten in a loop under load, over HTTP",
        "server",
        "right answer",
        "nothing",
        "right answer",
    )


def test_memory_does_not_grow_with_requests_and_evictions(faulty):
    """Every recipe is cold again and again: it comes back from the disk, then is merged anew, since the disk was emptied.

    After the first rounds resident memory stays: what the later ones make would be more than is allowed to be left of it.
    """
    right = {f"c{i}": faulty.ask(f"c{i}", 1) for i in range(COLD)}
    control, sizes, made = Control(faulty), [], 0
    for number in range(2 * ROUNDS):
        merged = faulty.status()["merges"]
        answers = at_once([lambda name=name: faulty.ask(name, 1) for name in right])
        assert all(
            label == right[name][1] and same(values, right[name][2])
            for name, (_, label, values) in zip(right, answers, strict=True)
        )
        until(lambda: not any(row["leases"] for row in faulty.status()["artifacts"]), "a lease stayed")
        artifacts = faulty.status()["artifacts"]
        for row in artifacts:
            control.call("evict", digest=row["digest"])
        until(lambda: not faulty.status()["artifacts"], "an artifact stayed")
        until(lambda: len(faulty.stored()) >= COLD, "what was evicted is not on the disk")
        if number % 2 == 0:  # the next round finds nothing there
            for path in faulty.stored():
                (path / "artifact.json").unlink()  # from here on the server leaves the rest alone
                until(lambda path=path: removed(path), "it cannot be removed")
        else:
            assert faulty.status()["merges"] - merged == COLD
            made += sum(row["bytes"] for row in artifacts)
        sizes.append(faulty.memory())
    control.close()
    assert sizes[-1] - sizes[ROUNDS // 2] < made // 2, (sizes, made)
    seen(f"{ROUNDS * COLD} merges and twice as many evictions", "server", "right answer", "nothing", "right answer")


def removed(path: Path) -> bool:
    shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


def merging(server: Running, name: str) -> None:
    control = Control(server)
    until(
        lambda: [
            m for m in control.call("status")["merging"] if m["name"].startswith(name) and m["status"] == "merging"
        ],
        "the merge never began",
    )
    control.close()


def group_of(server: Running) -> list[int]:
    """Every process of a server: it leads a session of its own."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[3]) == server.server.process.pid and fields[0] != "Z":
                    found.append(int(path.name))
    return found


def ended(server: Running) -> int:
    """The server's exit status, once all of its processes are gone."""
    until(lambda: server.server.process.poll() is not None, "the server goes on")
    until(lambda: not group_of(server), f"processes are left: {group_of(server)}")
    return int(server.server.process.returncode)


def struck(server: Running, name: str, strike: Callable[[Running], object]) -> tuple[str, str]:
    """Strike a server while it merges `name` for three requests: (what they got, what is left)."""
    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(server.ask(name, 1)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    merging(server, name)
    strike(server)
    for thread in threads:
        thread.join(2 * LONG)
        assert not thread.is_alive(), "a request hangs"
    assert len(got) == 3
    assert set(got) <= {0, 500, 503}, "none was answered with an artifact that was never made"
    code = ended(server)
    return "an error or a closed connection", f"no process; the server ends{' with an error' if code else ''}"


def comes_back(server: Running, folder: Path, *interrupted: str) -> str:
    """A server that is started again in the same place."""
    assert [server.ask(name, 1)[0] for name in ("c2", *interrupted)] == [200] * (1 + len(interrupted))
    assert server.status()["served_from"].get("disk", 0) >= 1, "what was merged before came from the disk"
    assert not list((folder / "merges").glob(".[0-9a-f]*")), "a half-written entry is left"
    assert len(list(server.runtime.glob("worker-*"))) == 2, "the socket and the alarm of a worker that is gone are left"
    return "right answer, after a restart"


@pytest.mark.timeout(3600)  # it starts three servers, one of them with four API processes
def test_servers_that_are_struck_while_they_merge(faulty, folder):
    """Runs after what the first server is for: stopped, then its worker killed, then one of four API processes."""
    assert faulty.ask("c2")[0] == 200
    until(faulty.stored, "nothing was stored")
    stopped = struck(faulty, "slow1", lambda server: server.server.process.send_signal(signal.SIGTERM))

    def kill_the_worker(server: Running) -> None:
        os.kill(server.worker_pid(), signal.SIGKILL)

    with running(folder, VLLM_MERGE_DISK=str(folder / "merges")) as second:
        seen("SIGTERM during a merge", "server", *stopped, comes_back(second, folder, "slow1"))
        killed = struck(second, "slow2", kill_the_worker)

    def kill_an_api_process(server: Running) -> None:
        """vLLM's supervisor then ends the others; what these do until then is played in test_faults.py."""
        control = Control(server)
        pids = until(lambda: len(found := control.call("status")["api_processes"]) == 4 and found, "four never came")
        control.close()
        os.kill(pids[-1], signal.SIGKILL)

    with running(folder, "--api-server-count", "4", VLLM_MERGE_DISK=str(folder / "merges")) as third:
        seen("the worker is killed during a merge", "server", *killed, comes_back(third, folder, "slow2"))
        lost = struck(third, "slow3", kill_an_api_process)
    with running(folder, VLLM_MERGE_DISK=str(folder / "merges")) as fourth:
        seen("one of 4 API processes is killed during a merge", "server", *lost, comes_back(fourth, folder, "slow3"))


def test_the_disk_is_full(tmp_path):
    """A file system of a quarter of a megabyte."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with running(tmp_path, VLLM_MERGE_DISK=str(place)) as server:
            first = [server.ask(f"c{i}") for i in range(4)]
            assert {status for status, *_ in first} == {200}
            until(lambda: "No space left on device" in server.server.tail(200_000), "the disk was not full")
            assert not [path for path in place.rglob("*.safetensors") if len(path.parent.name) != 64]
            again = [server.ask(f"c{i}") for i in range(4)]
            assert all(same(a[2], b[2]) for a, b in zip(first, again, strict=True))
        partial = [path.name for path in place.iterdir() if path.name.startswith(".") and path.name != ".merging"]
        seen(
            "the disk tier is a full file system",
            "server",
            "right answer",
            f"{', '.join(partial)}" if partial else "nothing",
            "right answer",
        )
        assert not partial
    finally:
        subprocess.run(["umount", str(place)], check=True)
