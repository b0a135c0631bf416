# SPDX-License-Identifier: Apache-2.0
"""Server-sent events: what is told, to whom, and when it ends."""

import asyncio
import contextlib
import json
import socket
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

import uvicorn

from tests.serving.companions import accompany
from tests.serving.played_server import BASE, played, recipe_file, write_adapter
from vllm_merge.serving.control.control import Session
from vllm_merge.serving.routes import event_routes
from vllm_merge.serving.routes import events as events_module
from vllm_merge.serving.routes.events import MAX_WAITING, EventHub
from vllm_merge.serving.settings import ADAPTER_ROOT_VARIABLE

MERGED = {"merge_method": "ties", "adapters": [{"adapter": "a0"}, {"adapter": "a1"}]}


@pytest.fixture
def config(tmp_path):
    return recipe_file(tmp_path / "files")


@contextlib.asynccontextmanager
async def listening(api):
    """A real HTTP server in front of an API process; gives (url, server)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(api.app, port=port, log_level="warning", lifespan="off"))
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        await serving


class Reader:
    """A client that reads events until it is stopped or the stream ends."""

    def __init__(self, url):
        self.events: list[tuple[str, dict]] = []
        self.heartbeats = 0
        self.task = asyncio.ensure_future(self._read(url))

    async def _read(self, url):
        async with httpx.AsyncClient(timeout=60) as client, client.stream("GET", f"{url}/v1/merge/events") as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            kind = ""
            async for line in reply.aiter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    self.events.append((kind, json.loads(line.removeprefix("data: "))))
                elif line == ":":
                    self.heartbeats += 1

    def of(self, kind):
        return [data for name, data in self.events if name == kind]


def test_everything_that_happens_is_told_at_every_process(config, tmp_path, monkeypatch):
    root = tmp_path / "root"
    write_adapter(root / "fresh", 7)
    monkeypatch.setenv(ADAPTER_ROOT_VARIABLE, str(root))

    async def scenario(server):
        one, other = server.apis
        for api in server.apis:
            accompany(api, adhoc="idle=5")
        async with listening(other) as (url, _):
            reader = Reader(url)
            await server.until(lambda: reader.of("hello"))
            await one.ask("m0")
            await server.until(lambda: any(event["state"] == "ready" for event in reader.of("merge")))
            started, ready = reader.of("merge")[0], reader.of("merge")[-1]
            assert (started["state"], started["artifact"]) == ("started", server.label("m0"))
            assert (ready["origin"], ready["rank"], ready["digest"]) == ("merge", 8, started["digest"])
            await server.idle()
            await one.admin("POST", "artifacts/m0/evict")
            await server.until(lambda: reader.of("eviction"))
            assert reader.of("eviction")[0]["artifact"] == server.label("m0")
            await one.admin("POST", "aliases/assistant", target="m1")
            await server.until(lambda: reader.of("alias"))
            (moved,) = reader.of("alias")
            assert (moved["alias"], moved["target"], moved["artifact"]) == ("assistant", "m1", server.label("m1"))
            await one.admin("POST", "adapters/fresh")
            await server.until(lambda: reader.of("adapter"))
            assert reader.of("adapter") == [{"state": "added", "adapter": "fresh", "generation": 3}]
            await one.admin("POST", "recipes/found", merge=MERGED)
            await one.admin("DELETE", "recipes/found")
            await server.until(lambda: len(reader.of("recipe")) == 2)
            told = [(event["state"], event["recipe"]) for event in reader.of("recipe")]
            assert told == [("added", "found"), ("removed", "found")]
            right = config.read_text()
            config.write_text("wrong")
            await server.look()
            config.write_text(right + "\n")
            await server.look()
            await server.until(lambda: len(reader.of("config")) == 2)
            assert [event["state"] for event in reader.of("config")] == ["refused", "reloaded"]
            assert "recipes.yaml:1" in reader.of("config")[0]["error"]
            label = (await one.ask(BASE, merge=MERGED)).json()["model"]
            await server.until(lambda: reader.of("adhoc"))
            assert reader.of("adhoc")[0]["artifact"] == label
            (config.parent / "a3" / "adapter_model.safetensors").write_bytes(b"damaged")
            await one.ask("m3")
            await server.until(lambda: any(event["state"] == "failed" for event in reader.of("merge")))
            reader.task.cancel()
            hub = other.app.state.vllm_merge_events
            await server.until(lambda: not hub._listeners)

    monkeypatch.setattr(event_routes, "LOOK_SECONDS", 0.05)
    played(scenario, config, apis=2)


def test_heartbeats_go_on_and_the_stream_ends_with_the_server(config, monkeypatch):
    monkeypatch.setattr(event_routes, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(event_routes, "HEARTBEAT_SECONDS", 0.05)

    async def scenario(server):
        api = server.apis[0]
        accompany(api)
        async with listening(api) as (url, _):
            reader = Reader(url)
            await server.until(lambda: reader.heartbeats >= 3)
            for link in api.front.links.all:  # as when vLLM stops: its workers end, then its HTTP server
                link.on_lost = lambda: None
                await link.close()
            await asyncio.wait_for(reader.task, 60)
        assert not api.app.state.vllm_merge_events._listeners

    played(scenario, config)


def test_listeners_are_bounded_in_number_and_in_what_waits_for_them(monkeypatch):
    async def scenario():
        state = SimpleNamespace(generation=1)
        hub = EventHub(lambda: state)
        monkeypatch.setattr(events_module, "MAX_LISTENERS", 2)
        assert not hub.full
        with hub.listen() as slow, hub.listen() as quick:
            assert hub.full
            for number in range(MAX_WAITING + 10):
                hub.publish("merge", {"number": number})
                if number % 100 == 0:
                    while (await quick.next(0)) is not None:
                        pass
            assert len(slow._waiting) == MAX_WAITING
            first = await slow.next(1)
            assert (first.kind, first.data) == ("lost", {"events": 11}), "hello and the ten oldest"
            assert (await slow.next(1)).data == {"number": 10}
        assert not hub.full

    asyncio.run(scenario())


def test_too_many_listeners_get_a_503_with_retry_after(config, monkeypatch):
    monkeypatch.setattr(events_module, "MAX_LISTENERS", 0)

    async def scenario(server):
        accompany(server.apis[0])
        response = await server.apis[0].client.get("/v1/merge/events")
        assert (response.status_code, response.headers["retry-after"]) == (503, "15")

    played(scenario, config)


def test_clients_that_come_at_once_are_no_more_than_may_listen(config, monkeypatch):
    """Each is let in before any of them listens."""
    monkeypatch.setattr(events_module, "MAX_LISTENERS", 2)

    async def scenario(server):
        api = server.apis[0]
        accompany(api)
        hub = api.app.state.vllm_merge_events

        async def is_disconnected():
            return False

        request = SimpleNamespace(app=api.app, is_disconnected=is_disconnected)
        streams = [(await event_routes.events(request)).body_iterator for _ in range(5)]
        told = [await anext(stream) for stream in streams]
        assert [text.partition(":")[0] for text in told] == ["id", "id", "retry", "retry", "retry"]
        assert len(hub._listeners) == 2
        for stream in streams:
            await stream.aclose()
        assert not hub._listeners

    played(scenario, config)


def test_a_process_that_does_not_read_is_not_written_to_for_ever():
    """A worker's memory does not grow because an API process hangs."""
    written = bytearray()
    transport = SimpleNamespace(get_write_buffer_size=lambda: len(written))
    writer = SimpleNamespace(is_closing=lambda: False, write=written.extend, transport=transport)
    session = Session(writer)
    for _ in range(3000):
        session.tell({"event": "news", "text": "x" * 1000})
    assert 1 << 20 <= len(written) < 2 << 20
    session.send({"id": 1})
    assert written.endswith(b'{"id":1}\n'), "an answer is always sent"
