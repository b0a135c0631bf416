# SPDX-License-Identifier: Apache-2.0
"""A judge to test with: an HTTP server of our own that likes one text."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class PlayedJudge:
    """likes: the text in the better answer; none: it says TIE. says: what it says instead. status: of its answers."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.likes, self.says, self.status = "", "", 200
        self.asked: list[str] = []
        self.keys: list[str | None] = []

    def verdict(self, asked: str) -> str:
        first, second = (re.search(f"<answer {name}>(.*?)</answer {name}>", asked, re.DOTALL)[1] for name in "AB")
        better = [name for name, answer in (("A", first), ("B", second)) if self.likes and self.likes in answer]
        return self.says or (better[0] if len(better) == 1 else "TIE")


@contextlib.contextmanager
def judging() -> Iterator[PlayedJudge]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            judge.keys.append(self.headers["authorization"])
            judge.asked.append(body["messages"][0]["content"])
            said = {"choices": [{"message": {"content": judge.verdict(judge.asked[-1])}}]}
            self.send_response(judge.status)
            self.end_headers()
            self.wfile.write(json.dumps(said if self.path == "/v1/chat/completions" else {}).encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge = PlayedJudge(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
