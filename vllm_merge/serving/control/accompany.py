# SPDX-License-Identifier: Apache-2.0
"""What an API process has beside the names that it serves: merges of requests, and listeners to events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from vllm_merge.serving.control.control import Message
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.requests.adhoc import AdHocMerges
from vllm_merge.serving.routes.events import EventHub
from vllm_merge.serving.settings import AdHocSettings, adapter_root


class Companions:
    """Made once the names are served; on_event() then follows them. state: of the application, where routes find what is here.

    Raises UserInputError for a wrong setting.
    """

    def __init__(self, state: Any, front: FrontDoor, published: Published) -> None:
        settings = AdHocSettings.read()
        adapter_root()
        models = state.openai_serving_models
        self._adhoc = AdHocMerges(front, models, published, settings) if settings is not None else None
        self._hub = EventHub(lambda: published.state)
        state.vllm_merge_adhoc, state.vllm_merge_events = self._adhoc, self._hub

    def on_event(self, event: Message) -> None:
        """What the control line says, after the names have followed it."""
        if self._adhoc is not None:
            self._adhoc.on_event(event)
        self._hub.on_event(event)

    def watches(self) -> list[Callable[[], Awaitable[None]]]:
        """What runs for as long as the server does."""
        return [self._adhoc.watch] if self._adhoc is not None else []
