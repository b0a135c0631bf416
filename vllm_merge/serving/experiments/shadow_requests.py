# SPDX-License-Identifier: Apache-2.0
"""Which requests a second arm can answer as well: one prompt of text, one answer, and nothing that happens outside of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_merge.serving.requests.bodies import Asked

MOST_BYTES = 256 << 10  # of a request that is kept until it has been compared
_ROUTES = ("/v1/completions", "/v1/chat/completions")
# Fields with which an answer is not that of one arm to one prompt, or which may be used once.
_SPECIAL = ("echo", "use_beam_search", "prompt_logprobs", "kv_transfer_params", "prompt_embeds", "suffix")
_OF_ONE = ("n", "best_of")
_LEFT_OUT = ("request_id",)


def comparable(path: str, asked: Asked) -> dict[str, Any] | None:
    """The document to send to another arm; None for a request that cannot be compared."""
    document = asked.document
    if path not in _ROUTES or document is None or asked.size > MOST_BYTES:
        return None
    if any(document.get(key) for key in _SPECIAL) or any(document.get(key) not in (None, 1) for key in _OF_ONE):
        return None
    if not (_text(document.get("prompt")) if path == _ROUTES[0] else _chat(document.get("messages"))):
        return None
    return {key: value for key, value in document.items() if key not in _LEFT_OUT}


def _text(prompt: object) -> bool:
    """One prompt, as text or as tokens."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt))


def _chat(messages: object) -> bool:
    """Text alone: pictures and sound are fetched again for every answer."""
    return isinstance(messages, list) and all(
        isinstance(one, dict) and _written(one.get("content")) for one in messages
    )


def _written(content: object) -> bool:
    if content is None or isinstance(content, str):
        return True
    parts = content if isinstance(content, list) else [None]
    return all(isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text") for part in parts)


def question(document: Mapping[str, Any]) -> str:
    """What was asked, for a judge to read: the prompt, or the messages; tokens as they are."""
    if "messages" not in document:
        return str(document["prompt"])
    return "\n\n".join(f"{one.get('role', '')}: {_said(one.get('content'))}" for one in document["messages"])


def _said(content: object) -> str:
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
