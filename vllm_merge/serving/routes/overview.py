# SPDX-License-Identifier: Apache-2.0
"""What a server serves and in which state it is, the same from every API process: the workers are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_merge.serving.control.control import Message
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.names import Name
from vllm_merge.serving.control.state import State


@dataclass(frozen=True)
class Current:
    """state: what every API process serves. workers: what each worker says of itself."""

    state: State
    workers: Sequence[Message]


async def current(app_state: Any) -> Current:
    """Ask the workers. `app_state` is that of a server whose start is over."""
    front: FrontDoor = app_state.vllm_merge
    workers = await front.describe_workers()
    published = app_state.vllm_merge_published
    served = workers[0].get("state_number")  # a worker that is gone has none
    return Current(published.state if served is None else published.as_of(served), workers)


def describe_names(front: FrontDoor, now: Current) -> list[dict[str, Any]]:
    """A row for every name: kind, artifact, and its state: ready (in memory of every worker), preparing, failed with the
    reason, or cold.
    """
    return [_row(front, known, now.workers) for known in now.state.names.names.values()]


def _row(front: FrontDoor, known: Name, workers: Sequence[Message]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": known.name,
        "kind": known.kind,
        "artifact": known.label or None,
        "digest": known.digest,
    }
    if known.digest is None:
        return {**row, "state": "failed", "reason": known.reason}
    if held := in_memory(workers, known.digest):
        facts: dict[str, Any] = {key: held[key] for key in ("rank", "bytes", "seconds", "tier") if key in held}
        return {**row, "state": "ready", "reason": None, **facts}
    if any(find(worker.get("merging", ()), known.digest) for worker in workers):
        return {**row, "state": "preparing", "reason": None}
    failures = [worker.get("failures", {}).get(known.digest) for worker in workers]
    if reason := next(filter(None, failures), None):
        return {**row, "state": "failed", "reason": reason}
    artifact = front.artifacts.get(known.digest)
    state = artifact.state if artifact is not None and artifact.state == "failed" else "cold"
    return {**row, "state": state, "reason": artifact.reason if artifact is not None and state == "failed" else None}


def in_memory(workers: Sequence[Message], digest: str) -> Message | None:
    """What the first worker says of an artifact that every worker has in memory; None for any other."""
    held = [find([*worker.get("artifacts", ()), *_on_host(worker)], digest) for worker in workers]
    return held[0] if all(found is not None for found in held) else None


def _on_host(worker: Message) -> Sequence[Message]:
    rows: Sequence[Message] = (worker.get("host") or {}).get("artifacts", ())
    return rows


def find(rows: Sequence[Message], digest: str) -> Message | None:
    return next((row for row in rows if row["digest"] == digest), None)
