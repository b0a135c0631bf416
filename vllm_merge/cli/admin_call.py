# SPDX-License-Identifier: Apache-2.0
"""Asking a server to change something, with the admin token and the API key of the environment."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

from vllm_merge.errors import MergeError, UserInputError

TOKEN_VARIABLE = "VLLM_MERGE_ADMIN_TOKEN"
TOKEN_HEADER = "x-vllm-merge-admin-token"
KEY_VARIABLES = ("VLLM_API_KEY", "OPENAI_API_KEY")
TIMEOUT_SECONDS = 120.0
NO_ROUTE = (404, "Not Found")  # what FastAPI says of a path that no route has; no route says it of a name


def admin_post(server: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a POST of `body`. Raises UserInputError for what was asked wrongly, MergeError for what failed."""
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise UserInputError(f"set {TOKEN_VARIABLE} to the token that the server was started with")
    if not server.startswith(("http://", "https://")):
        raise UserInputError(f"--server {server}: is not a URL; expected something like http://localhost:8000")
    headers = {"content-type": "application/json", TOKEN_HEADER: token}
    if key := next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None):
        headers["authorization"] = f"Bearer {key}"
    url = server.rstrip("/").removesuffix("/v1") + quote(path)
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
            found: dict[str, Any] = json.loads(reply.read())
            return found
    except urllib.error.HTTPError as error:
        said = _said(error)
        if (error.code, said) == NO_ROUTE:
            said = f"has no route {path}: it was started without {TOKEN_VARIABLE}, or is no vllm-merge server"
        message = f"--server {server}: {error.code}: {said}"
        raise (UserInputError if error.code < 500 else MergeError)(message) from None
    except urllib.error.URLError as error:
        what = getattr(error.reason, "strerror", None) or error.reason
        raise UserInputError(f"--server {server}: cannot be reached: {what}") from None
    except (TimeoutError, ConnectionError) as error:
        raise MergeError(
            f"--server {server}: {error or 'timed out'}; it may have been done: look at `experiment list`"
        ) from None
    except ValueError:
        raise MergeError(f"--server {server}: the answer is not JSON; is this a vllm-merge server?") from None


def _said(error: urllib.error.HTTPError) -> str:
    """The server's own words, if it has any."""
    raw = error.read(10_000)
    try:
        found = json.loads(raw)
        said = found.get("error", found.get("detail", found))
        return str(said.get("message", said) if isinstance(said, dict) else said)[:500]
    except (ValueError, AttributeError):
        return raw.decode(errors="replace").strip()[:200] or str(error.reason)
