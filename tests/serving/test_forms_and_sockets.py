# SPDX-License-Identifier: Apache-2.0
"""Routes of vLLM that take a model's name in a form or over a web socket, asked for a merge of a model of text.

vLLM has them for models of speech alone, so the answer is that there is no such route: for a merge as for the base, and the
server goes on.
"""

import http.client
import json
import urllib.error
import urllib.request

import pytest

from tests.conftest import DEMO

MERGE, BASE = "weighted", str(DEMO / "model")
BOUNDARY = "a-boundary"


def form(model: str) -> bytes:
    """A form with a model's name and a file of sound."""
    parts = {'name="model"': model.encode(), 'name="file"; filename="a.wav"': b"RIFF$\0\0\0WAVE"}
    body = b"".join(
        b"--%b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (BOUNDARY.encode(), head.encode(), content)
        for head, content in parts.items()
    )
    return body + f"--{BOUNDARY}--\r\n".encode()


def told(server, path: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
    """(status, text) of an answer that is no success."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=60)
    return caught.value.code, caught.value.read().decode()


def right(server) -> bool:
    body = {"model": MERGE, "prompt": "upper: ring ->", "max_tokens": 8, "temperature": 0, "stop": ["\n"]}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return json.load(connection.getresponse())["choices"][0]["text"].strip() == "RING"


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
def test_a_form(demo_server, path):
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    answers = [told(demo_server, path, form(name), headers) for name in (MERGE, BASE)]
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert "Not Found" in answers[0][1]
    assert right(demo_server)


def test_a_web_socket(demo_server):
    """The handshake; the name would be sent once it is done."""
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    status, _ = told(demo_server, f"/v1/realtime?model={MERGE}", None, headers)
    assert status in (403, 404)
    assert right(demo_server)
