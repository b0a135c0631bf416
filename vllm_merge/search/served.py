# SPDX-License-Identifier: Apache-2.0
"""What a search has to know of its server first: that it merges for requests, of what, and how much at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.problems import listed, suggested
from vllm_merge.search.endpoint import Endpoint, Refused


@dataclass(frozen=True)
class Served:
    """model: the base model's name. adapters: {name: content hash} of those that are merged. together: candidates that are asked
    side by side: one slot less than there are is theirs, so that other traffic has one. rate: new merges of requests in a
    minute."""

    model: str
    adapters: dict[str, str]
    together: int
    rate: int
    aliases: dict[str, str]


def look(endpoint: Endpoint, wanted: Sequence[str] | None) -> Served:
    """Ask the server. wanted: adapters; None for every registered one. Raises UserInputError where it cannot be searched on."""
    try:
        limits = endpoint.get("/merge/adhoc")["limits"]
        adapters = {row["adapter"]: row for row in endpoint.get("/merge/adapters")["data"]}
        workers = endpoint.get("/merge/artifacts")["data"]
        aliases = {row["alias"]: row["target"] for row in endpoint.get("/merge/aliases")["data"]}
        model = next(str(card["id"]) for card in endpoint.get("/models")["data"] if card.get("parent") is None)
    except Refused as error:
        if error.status == 404:
            raise UserInputError(f"{error}; is this a vllm-merge server?") from None
        raise UserInputError(str(error)) from None
    except (KeyError, TypeError, StopIteration):
        raise UserInputError(
            "--server: its answers under /v1/merge are not as expected; is it of another version?"
        ) from None
    if limits is None:
        raise UserInputError("--server: merges nothing for requests; start it with VLLM_MERGE_ADHOC=on (docs/adhoc.md)")
    chosen = list(wanted) if wanted is not None else [name for name, row in adapters.items() if row["reason"] is None]
    for name in chosen:
        if name not in adapters:
            raise UserInputError(f"--adapters: the server has no adapter {name!r}{suggested(name, adapters, 'it has')}")
        if adapters[name]["reason"] is not None:
            raise UserInputError(f"--adapters: {name!r} cannot be merged: {adapters[name]['reason']}")
    if len(set(chosen)) < len(chosen):
        raise UserInputError("--adapters: names one twice")
    if len(chosen) < 2:
        raise UserInputError(f"a search needs two adapters at least; the server has: {listed(adapters)}")
    if len(chosen) > limits["adapters"]:
        raise UserInputError(
            f"{len(chosen)} adapters, and the server merges {limits['adapters']} at most for a request; choose with --adapters, "
            f"or start it with VLLM_MERGE_ADHOC=adapters={len(chosen)}"
        )
    slots = min((worker.get("slot_count", 1) for worker in workers), default=1)
    together = max(1, min(slots - 1, limits["count"]))
    return Served(
        model, {name: str(adapters[name]["content_hash"]) for name in chosen}, together, limits["rate"], aliases
    )
