# SPDX-License-Identifier: Apache-2.0
"""Four API processes in front of one engine: one merge however many ask, one state, and no answer from before a move.

A listening socket that processes share gives most connections to one of them. So every test talks over connections that
were made while the other processes stood still: it knows which process answers.
"""

import contextlib
import http.client
import json
import os
import signal
import tarfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import yaml

from tests.conftest import DEMO, Control, servers
from tests.serving.scraping import samples, scraped, total
from vllm_merge.adapters.factors import Adapter

PROMPT = "upper: stone ->"
TOKEN = "an-admin-token"
API_SERVERS = 4
CONNECTIONS = 10  # to each process
MOVES = 20
AFTER_EACH_MOVE = 3  # requests to each process
ADAPTERS = sorted(path.name for path in (DEMO / "adapters").iterdir())
EVERYTHING = [{"adapter": name} for name in ADAPTERS]


def document(alias_target: str) -> dict:
    pair = [{"adapter": "upper"}, {"adapter": "reverse"}]
    cold = {"merge_method": "ties", "space": "delta", "adapters": EVERYTHING * 4, "load": "lazy", "rank": 64}
    return {
        "version": 1,
        "adapters": {name: {"path": str(DEMO / "adapters" / name)} for name in ADAPTERS},
        "recipes": {
            "a": {"merge_method": "linear", "adapters": pair},
            "b": {"merge_method": "task_arithmetic", "adapters": pair},
            "cold": cold,
        },
        "aliases": {"assistant": alias_target},
    }


class Connection:
    """A connection to one API process, used by one thread at a time."""

    def __init__(self, server):
        self._http = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        self.call("/v1/merge/aliases")  # now the process has it

    def send(self, path: str, body: dict | None = None, headers: dict | None = None) -> tuple[int, dict]:
        content = json.dumps(body) if body is not None else None
        self._http.request(
            "GET" if body is None else "POST", path, content, {"Content-Type": "application/json", **(headers or {})}
        )
        reply = self._http.getresponse()
        return reply.status, json.loads(reply.read())

    def call(self, path: str, body: dict | None = None, headers: dict | None = None) -> dict:
        status, answer = self.send(path, body, headers)
        assert status == 200, answer
        return answer

    def ask(self, model: str) -> str:
        """The artifact that answers."""
        body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0}
        return self.call("/v1/completions", body)["model"]

    def text(self, path: str) -> str:
        self._http.request("GET", path)
        return self._http.getresponse().read().decode()

    def move(self, target: str) -> dict:
        return self.call("/v1/merge/aliases/assistant", {"target": target}, {"x-vllm-merge-admin-token": TOKEN})

    def close(self) -> None:
        self._http.close()


@dataclass
class Api:
    pid: int
    connections: list[Connection]

    @property
    def first(self) -> Connection:
        return self.connections[0]


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def api_servers(tmp_path_factory):
    """`vllm-merge serve … --api-server-count 4`; `.config` is its recipe file, `.runtime` the folder of the sockets."""
    config = tmp_path_factory.mktemp("files") / "recipes.yaml"
    config.write_text(yaml.safe_dump(document("a")))
    runtime = tmp_path_factory.mktemp("runtime")
    options = ("--api-server-count", str(API_SERVERS), "--max-loras", "4", "--max-lora-rank", "64")
    environment = {
        "VLLM_MERGE_RUNTIME_DIR": str(runtime),
        "VLLM_MERGE_ADMIN_TOKEN": TOKEN,
        "VLLM_MERGE_ADHOC": "on",
        "VLLM_MERGE_ADAPTER_ROOT": str(DEMO / "adapters"),
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    }
    with servers.running(servers.merge_serve(DEMO / "model", config, *options), environment) as server:
        server.config, server.runtime = config, runtime
        yield server


@pytest.fixture(scope="module")
def apis(api_servers) -> Iterator[list[Api]]:
    """Every API process, with connections to it."""
    control = Control(api_servers)
    deadline = time.monotonic() + 60
    while len(pids := control.call("status")["api_processes"]) < API_SERVERS:  # vLLM answers once one of them is up
        assert time.monotonic() < deadline
        time.sleep(0.1)
    control.close()
    found = []
    for pid in pids:
        with stopped([other for other in pids if other != pid]):
            found.append(Api(pid, [Connection(api_servers) for _ in range(CONNECTIONS)]))
    yield found
    for connection in all_of(found):
        connection.close()


def all_of(apis: list[Api]) -> list[Connection]:
    return [connection for api in apis for connection in api.connections]


@pytest.fixture
def worker(api_servers):
    control = Control(api_servers)
    yield control
    control.close()


def at_once(calls: list) -> list:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_forty_cold_requests_to_four_processes_are_one_merge(apis, worker):
    before = worker.call("status")["merges"]
    answers = at_once([lambda c=connection: c.ask("cold") for connection in all_of(apis)])
    assert len(answers) == 40
    assert len(set(answers)) == 1
    assert worker.call("status")["merges"] - before == 1


@pytest.mark.parametrize("path", ["/v1/merge/recipes", "/v1/merge/aliases", "/v1/models"])
def test_every_process_says_the_same(apis, path):
    apis[0].first.ask("a")
    said = [api.first.call(path)["data"] for api in apis]
    for row in (row for rows in said for row in rows):
        row.pop("created", None)
        row.pop("permission", None)
    assert all(rows == said[0] for rows in said)
    if path.endswith("recipes"):
        assert {row["state"] for row in said[0] if row["name"] in ("a", "b", "assistant")} == {"ready"}


def test_after_a_move_is_answered_no_process_answers_as_before(apis):
    artifacts = {name: apis[0].first.ask(name) for name in ("a", "b")}
    asked: list[list[tuple[float, float, str]]] = [[] for _ in apis]  # by process: begun, ended, artifact
    stop = threading.Event()

    def hammer(connection: Connection, rows: list) -> None:
        while not stop.is_set():
            begun = time.monotonic()
            artifact = connection.ask("assistant")
            rows.append((begun, time.monotonic(), artifact))

    threads = [
        threading.Thread(target=hammer, args=(connection, rows))
        for api, rows in zip(apis, asked, strict=True)
        for connection in api.connections[1:3]
    ]
    for thread in threads:
        thread.start()
    moves = []  # answered, next one begun, artifact
    generation = apis[0].first.call("/v1/merge/recipes")["file"]["generation"]
    try:
        for number in range(MOVES):
            target = "ba"[number % 2]
            reply = apis[number % API_SERVERS].first.move(target)
            answered = time.monotonic()
            assert (reply["generation"], reply["artifact"]) == (generation + number + 1, artifacts[target])
            while any(sum(1 for row in rows if row[0] > answered) < AFTER_EACH_MOVE for rows in asked):
                assert time.monotonic() < answered + 60
                time.sleep(0.005)
            moves.append((answered, time.monotonic(), artifacts[target]))
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    for answered, next_begun, artifact in moves:
        for rows in asked:
            between = [row for row in rows if answered < row[0] and row[1] < next_begun]
            assert len(between) >= AFTER_EACH_MOVE
            assert {row[2] for row in between} == {artifact}


def test_once_any_process_says_a_generation_is_served_none_answers_as_before(api_servers, apis):
    apis[0].first.move("a")
    for number, target in enumerate("ba"):
        artifact = apis[0].first.ask(target)
        before = apis[0].first.call("/v1/merge/recipes")["file"]["generation"]
        api_servers.config.write_text(yaml.safe_dump(document(target)) + f"# {number}\n")
        deadline = time.monotonic() + 30
        while apis[number].first.call("/v1/merge/recipes")["file"]["generation"] == before:
            assert time.monotonic() < deadline, "the change was not seen"
        answers = at_once([lambda c=connection: c.ask("assistant") for connection in all_of(apis)])
        assert set(answers) == {artifact}
        assert {api.first.call("/v1/merge/recipes")["file"]["generation"] for api in apis} == {before + 1}


def test_moving_needs_the_token_and_a_target_that_is_there(apis):
    right = {"x-vllm-merge-admin-token": TOKEN}
    for headers, target, alias, status in (
        ({}, "b", "assistant", 403),
        ({"x-vllm-merge-admin-token": "wrong"}, "b", "assistant", 403),
        (right, "b", "nobody", 404),
        (right, "nobody", "assistant", 422),
    ):
        assert apis[1].first.send(f"/v1/merge/aliases/{alias}", {"target": target}, headers)[0] == status


def test_metrics_sum_what_the_processes_counted_and_say_each_workers_numbers_once(api_servers, apis, worker):
    def requests() -> float:
        return total(scraped(api_servers), "vllm_merge_requests_total", recipe="a", outcome="ok")

    before = requests()
    at_once([lambda c=connection: c.ask("a") for connection in all_of(apis)])
    deadline = time.monotonic() + 60
    while requests() != before + len(all_of(apis)):  # counted when an answer has ended, which is after it was read
        assert time.monotonic() < deadline
    while any(total(samples(api.first.text("/metrics")), "vllm_merge_worker_up") != 1 for api in apis):
        assert time.monotonic() < deadline  # each asks the worker itself, within a time limit
    merges = worker.call("status")["merges"]
    for connection in [api.first for api in apis]:  # whichever process answers
        found = samples(connection.text("/metrics"))
        assert total(found, "vllm_merge_merges_total", outcome="done") == merges
        assert total(found, "vllm_merge_worker_up") == 1
        assert total(found, "vllm_merge_requests_total", recipe="a", outcome="ok") == before + len(all_of(apis))


def test_a_merge_of_a_request_is_one_artifact_at_every_process(apis, worker):
    pair = [{"adapter": "upper"}, {"adapter": "sort"}]
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    merge = {"merge_method": "task_arithmetic", "adapters": pair}
    in_body = {**body, "model": "whatever", "merge": merge}
    as_name = {**body, "model": "merge:task_arithmetic(upper,sort)"}
    before = worker.call("status")["merges"]
    calls = [(api.connections[i], asked) for api in apis for i, asked in enumerate((in_body, as_name))]
    answers = at_once([lambda c=c, asked=asked: c.call("/v1/completions", asked) for c, asked in calls])
    (label,) = {answer["model"] for answer in answers}
    assert label.startswith("adhoc@")
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    assert worker.call("status")["merges"] - before == 1
    by_label = {api.first.call("/v1/completions", {**body, "model": label})["choices"][0]["text"] for api in apis}
    assert by_label == {answers[0]["choices"][0]["text"]}
    for api in apis:
        (listed,) = [model for model in api.first.call("/v1/models")["data"] if model["id"] == label]
        assert listed["parent"] == str(DEMO / "model")
    chat = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4, "model": "any", "merge": merge}
    assert apis[0].first.call("/v1/chat/completions", chat)["model"] == label
    status, wrong = apis[1].first.send("/v1/completions", {**in_body, "merge": {**merge, "path": "/etc"}})
    assert (status, wrong["error"]["param"]) == (400, "merge.path")


def test_events_of_one_process_are_heard_at_another_and_a_download_is_what_answers(api_servers, apis, tmp_path):
    headers = {"x-vllm-merge-admin-token": TOKEN}
    with urllib.request.urlopen(f"{api_servers.url}/v1/merge/events", timeout=60) as events:
        assert events.readline().startswith(b"id: ")
        target = "b" if apis[0].first.call("/v1/merge/aliases")["data"][0]["target"] == "a" else "a"
        apis[3].first.move(target)
        while not (line := events.readline()).startswith(b"event: alias"):
            assert line, "the stream ended before the move was told"
        assert json.loads(events.readline().removeprefix(b"data: "))["target"] == target
    assert apis[2].first.call("/v1/merge/aliases/assistant/back", {}, headers)["target"] != target
    request = urllib.request.Request(f"{api_servers.url}/v1/merge/artifacts/b/download", headers=headers)
    with urllib.request.urlopen(request) as reply, tarfile.open(fileobj=reply, mode="r|") as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    assert Adapter.from_peft(folder).factors
    assert json.loads((folder / "merge_report.json").read_text())["method"] == "task_arithmetic"
    described = apis[0].first.call("/openapi.json")["paths"]
    assert {"/v1/merge/events", "/v1/merge/recipes/plan", "/v1/merge/adapters/{name}"} <= set(described)
    status, answer = apis[0].first.send("/v1/merge/adapters/upper", {}, headers)
    assert (status, answer["error"]["code"]) == (409, 409), "a name of the file, in the shape of vLLM's errors"


@pytest.mark.full
def test_every_route_keeps_its_promises_whatever_it_is_sent(api_servers, apis):
    pytest.importorskip("schemathesis")
    from tests.serving.fuzzing import fuzz, operations

    for operation in operations(api_servers.url):
        assert fuzz(operation) > 1
    assert len({api.first.ask("a") for api in apis}) == 1


@pytest.mark.full
def test_a_process_that_hangs_holds_a_move_up_and_is_named(apis):
    before, after = apis[0].first.ask("a"), apis[0].first.ask("b")
    apis[0].first.move("a")
    with stopped([apis[3].pid]):
        headers = {"x-vllm-merge-admin-token": TOKEN}
        status, answer = apis[0].first.send("/v1/merge/aliases/assistant", {"target": "b"}, headers)
        assert status == 503
        assert f"API process {apis[3].pid} has not answered" in str(answer)
        assert apis[1].first.call("/v1/merge/aliases")["data"][0]["artifact"] == before, "it does not count yet"
    deadline = time.monotonic() + 60
    while apis[1].first.call("/v1/merge/aliases")["data"][0]["artifact"] != after:
        assert time.monotonic() < deadline
    assert {api.first.ask("assistant") for api in apis} == {after}
