# SPDX-License-Identifier: Apache-2.0
"""Asking a server: a small one that answers, is busy, refuses, or is no OpenAI server."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.evaluation.server import Server


class FakeServer(ThreadingHTTPServer):
    """Answers with the prompt reversed. `busy`: how many requests are put off first; `reply`: a (status, body) for all."""

    busy = 0
    reply: tuple[int, bytes] | None = None
    seen: list[tuple[str, dict[str, Any], str | None]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        cards = [{"id": "base", "parent": None}, {"id": "r", "parent": "base"}]
        self._send(*(self.server.reply or (200, json.dumps({"data": cards}).encode())))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.server.busy > 0:
            self.server.busy -= 1
            self._send(503, b'{"error": {"message": "merging"}}', {"Retry-After": "0.1"})
        elif self.server.reply is not None:
            self._send(*self.server.reply)
        elif self.path.endswith("/chat/completions"):
            text = body["messages"][0]["content"][::-1]
            self._send(200, json.dumps({"choices": [{"message": {"content": text}}]}).encode())
        else:
            self._send(200, json.dumps({"choices": [{"text": body["prompt"][::-1]}]}).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_answers_in_order(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    prompts, done = [f"prompt {i}" for i in range(20)], []
    server = Server(fake.url + "/v1/", 7)
    assert server.answers("r", prompts, done.append) == [prompt[::-1] for prompt in prompts]
    assert done == list(range(1, 21))
    path, body, key = fake.seen[0]
    assert (path, key) == ("/v1/completions", "Bearer secret")
    assert {name: body[name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "r",
        "max_tokens": 7,
        "temperature": 0,
    }
    assert server.models() == {"base": None, "r": "base"}


def test_chat(fake: FakeServer) -> None:
    assert Server(fake.url, 7, chat=True).answers("r", ["abc"], lambda done: None) == ["cba"]
    assert fake.seen[0][0] == "/v1/chat/completions"
    assert fake.seen[0][1]["messages"] == [{"role": "user", "content": "abc"}]


def test_a_busy_server_is_asked_again(fake: FakeServer) -> None:
    fake.busy = 2
    assert Server(fake.url, 7).answers("r", ["abc"], lambda done: None) == ["cba"]
    assert len(fake.seen) == 3


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((404, b'{"error": {"message": "no model r"}}'), "/completions: 404: no model r"),
        ((401, b'{"error": "Unauthorized"}'), "/completions: 401: Unauthorized"),
        ((500, b"oops"), "/completions: 500: oops"),
        ((200, b"<html>"), "/completions: the answer is not JSON; is this an OpenAI server?"),
        ((200, b"{}"), "the answer of 'r' is not one of OpenAI's interface"),
    ],
)
def test_what_goes_wrong_is_said(reply: tuple[int, bytes], message: str, fake: FakeServer) -> None:
    fake.reply = reply
    with pytest.raises(MergeError) as caught:
        Server(fake.url, 7).answers("r", ["a", "b", "c"], lambda done: None)
    assert str(caught.value).startswith(f"--server {fake.url}: {message}")


def test_wrong_addresses(fake: FakeServer) -> None:
    with pytest.raises(UserInputError) as caught:
        Server("localhost:8000", 7)
    assert str(caught.value) == "--server localhost:8000: is not a URL; expected something like http://localhost:8000"
    fake.shutdown()
    fake.server_close()
    with pytest.raises(UserInputError) as caught:
        Server(fake.url, 7).models()
    assert str(caught.value) == f"--server {fake.url}: cannot be reached: Connection refused"


def test_models_of_no_openai_server(fake: FakeServer) -> None:
    fake.reply = (200, b'{"models": []}')
    with pytest.raises(UserInputError, match=r"/v1/models is not a list of models; is this an OpenAI server\?$"):
        Server(fake.url, 7).models()
