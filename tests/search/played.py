# SPDX-License-Identifier: Apache-2.0
"""A server of merges that is played over HTTP: a merge answers the better, the nearer its λ · density is to 1."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from vllm_merge.recipe.adhoc import PREFIX, parse_name

TOKEN = "an-admin-token"
ANSWER = "right"
SIZE = 0.5  # of every method's result with λ = 1


class PlayedMerges:
    """`refuse(model, n)`: (status, Retry-After) or None for the n-th request of a model. Everything that came is in `asked`."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.recipes: list[str] = []
        self.admin: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.refuse: Callable[[str, int], tuple[int, str | None] | None] = lambda model, n: None
        self.limits: dict[str, int] | None = {"count": 16, "adapters": 8, "rank": 0, "rate": 30}
        self.seen: Counter[str] = Counter()
        self.most = self._running = 0
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None: ...

            def do_GET(self) -> None:
                found = owner.get(unquote(self.path.removeprefix("/v1")))
                self._answer(200 if found is not None else 404, found or {"error": {"message": "no such route"}})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.keys.add(self.headers.get("Authorization"))
                path = self.path.removeprefix("/v1")
                if path.startswith("/merge/"):
                    right = self.headers.get("x-vllm-merge-admin-token") == TOKEN
                    self._answer(
                        200 if right else 403, owner.change(path, body) if right else {"error": {"message": "no"}}
                    )
                    return
                with owner.lock:
                    owner._running += 1
                    owner.most = max(owner.most, owner._running)
                    owner.seen[body["model"]] += 1
                    refused = owner.refuse(body["model"], owner.seen[body["model"]])
                    if refused is None:
                        owner.asked.append(body)
                try:
                    if refused is not None:
                        self._answer(refused[0], {"error": {"message": f"refused {body['model']}"}}, refused[1])
                    else:
                        self._answer(200, owner.complete(path, body))
                finally:
                    with owner.lock:
                        owner._running -= 1

            def _answer(self, status: int, body: dict[str, Any], after: str | None = None) -> None:
                raw = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                if after is not None:
                    self.send_header("Retry-After", after)
                self.end_headers()
                self.wfile.write(raw)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, path: str) -> dict[str, Any] | None:
        if path == "/merge/adhoc":
            return {"limits": self.limits, "data": []}
        if path == "/merge/adapters":
            rows = [
                {"adapter": name, "content_hash": f"{name}-hash", "reason": None} for name in ("sql", "code", "chat")
            ]
            return {"data": [*rows, {"adapter": "broken", "content_hash": None, "reason": "cannot be read"}]}
        if path == "/merge/artifacts":
            return {"data": [{"slots": {"0": "3f9c"}, "slot_count": 4}]}
        if path == "/merge/aliases":
            return {"data": [{"alias": "assistant", "target": "old"}]}
        if path == "/merge/recipes":
            return {"data": [{"name": name} for name in ("old", *self.recipes)]}
        if path == "/models":
            return {"data": [{"id": "base", "parent": None}, {"id": "assistant", "parent": "base"}]}
        if re.fullmatch(r"/merge/artifacts/adhoc@\w+/report", path):
            return {
                "report": {
                    "norms": {"q": 3.0 * SIZE, "k": 4.0 * SIZE},
                    "input_norms": {"q": [3.0, 0.0], "k": [0.0, 4.0]},
                }
            }
        return None

    def change(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self.admin.append((path, body))
        self.recipes.append(path.rpartition("/")[2])
        return {"artifact": "found@0123456789ab", "generation": 2}

    def complete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        model = body["model"]
        if model == "judge":
            text = "Grade: 7.5" if ANSWER in body["messages"][0]["content"].rpartition("grade")[2] else "none"
            return {"model": model, "choices": [{"message": {"content": text}}]}
        prompt = body.get("prompt") or body["messages"][0]["content"]
        right = random.Random(f"{model} {prompt}").random() < self.chance(model)
        text = f"\n {ANSWER if right else 'wrong'}\nmore"
        if body.get("echo"):
            values = [None, -1.0, -0.5 if right else -2.0, -0.25 if right else -4.0, -9.0]
            tops = [None, {"x": -1.0}, {"x": -0.5}, {"x": -0.25}, {"x": -9.0}]
            tokens = ["<s>", prompt[: -len(ANSWER)], ANSWER[:2], ANSWER[2:], "!"]
            logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops}
            return {"model": model, "choices": [{"text": text, "logprobs": logprobs}]}
        label = f"adhoc@{abs(hash(model)):012x}"[:18] if model.startswith(PREFIX) else model
        choice = {"text": text} if path == "/completions" else {"message": {"content": text}}
        return {"model": label, "choices": [choice]}

    def chance(self, model: str) -> float:
        if not model.startswith(PREFIX):
            return 0.4
        parameters = parse_name(model).recipe["parameters"]
        product = SIZE * parameters.get("lambda", 1.0) * parameters.get("density", 0.2) * 5
        return max(0.05, 0.95 - abs(product - 1))
