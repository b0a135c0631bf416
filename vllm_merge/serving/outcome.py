# SPDX-License-Identifier: Apache-2.0
"""What became of the HTTP request that is being answered, noted where its lease is taken, read where its answer is sent.

On routes whose requests reach their artifact through the engine client alone, and for what fails after a request entered the
engine, this is how the answer gets its headers and its 503.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass
class Outcome:
    """label: of the artifact that the request uses. error: why it could not."""

    label: str | None = None
    error: Exception | None = None


_current: ContextVar[Outcome | None] = ContextVar("vllm_merge_outcome", default=None)


def begin() -> Outcome:
    """Note what happens to the request of this task, and of tasks that it starts, from now on."""
    outcome = Outcome()
    _current.set(outcome)
    return outcome


def note_label(label: str) -> None:
    outcome = _current.get()
    if outcome is not None and outcome.label is None:
        outcome.label = label


def note_error(error: Exception) -> None:
    outcome = _current.get()
    if outcome is not None:
        outcome.error = error
