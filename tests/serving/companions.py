# SPDX-License-Identifier: Apache-2.0
"""What the plugin starts beside the names, for an API process of a played server."""

from __future__ import annotations

from typing import Any

from tests.serving.played_server import PlayedApi, environment
from vllm_merge.serving.control.accompany import Companions


def accompany(api: PlayedApi, adhoc: str = "off") -> Companions:
    """adhoc: the value of VLLM_MERGE_ADHOC."""
    with environment(VLLM_MERGE_ADHOC=adhoc):
        companions = Companions(api.app.state, api.front, api.published)
    (link,) = api.front.links.all
    before = link._on_event

    def on_event(event: dict[str, Any]) -> None:
        before(event)
        companions.on_event(event)

    link._on_event = on_event
    return companions
