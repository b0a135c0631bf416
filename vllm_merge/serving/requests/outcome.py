# SPDX-License-Identifier: Apache-2.0
"""What became of the HTTP request that is being answered, noted where the engine is asked, read where its answer is sent.

On routes whose requests reach their artifact through the engine client alone, and for what fails after a request entered the
engine, this is how the answer gets its headers and its 503. Tokens are counted here as well: an answer need not say how many
they were, and a chunk of a stream may hold several.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tape:
    """Token ids that went into the engine and came out, and the text that came out. calls: to the engine; with more than one the ids are of no use."""

    calls: int = 0
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """name: as asked. label: of the artifact that the request uses. error: why it could not. Tokens: of everything that the engine was
    asked for this request (several prompts, n > 1, tool calls); None before the engine said anything. tape: where its tokens are
    kept, for requests that are compared (shadow.py).
    """

    name: str = ""
    label: str | None = None
    error: Exception | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish: str | None = None
    tape: Tape | None = None


_current: ContextVar[Outcome | None] = ContextVar("vllm_merge_outcome", default=None)


def begin(name: str = "") -> Outcome:
    """Note what happens to the request of this task, and of tasks that it starts, from now on."""
    outcome = Outcome(name)
    _current.set(outcome)
    return outcome


def asked_name() -> str:
    """The name of ours that the request of this task asked for; "" where there is none."""
    outcome = _current.get()
    return outcome.name if outcome is not None else ""


def note_label(label: str) -> None:
    outcome = _current.get()
    if outcome is not None and outcome.label is None:
        outcome.label = label


def note_error(error: Exception) -> None:
    outcome = _current.get()
    if outcome is not None:
        outcome.error = error


def counter() -> Callable[[Any], None] | None:
    """Counts the tokens in the outputs of one call to the engine; None where nobody wants to know.

    The API server asks the engine for what is new in each output of a stream, and for one output otherwise, so their
    tokens add up.
    """
    outcome = _current.get()
    if outcome is None:
        return None
    prompt_counted = False
    tape = outcome.tape
    if tape is not None:
        tape.calls += 1

    def count(output: Any) -> None:
        nonlocal prompt_counted
        if not prompt_counted:
            prompt_counted = True
            prompt = getattr(output, "prompt_token_ids", None) or ()
            outcome.prompt_tokens = (outcome.prompt_tokens or 0) + len(prompt)
            if tape is not None:
                tape.prompt.extend(prompt)
        completions = getattr(output, "outputs", None)
        if isinstance(completions, list):  # what is pooled has no tokens
            for completion in completions:
                tokens = getattr(completion, "token_ids", ())
                outcome.completion_tokens = (outcome.completion_tokens or 0) + len(tokens)
                if tape is not None:
                    tape.answer.extend(tokens)
                    tape.text.append(getattr(completion, "text", ""))
                outcome.finish = getattr(completion, "finish_reason", None) or outcome.finish

    return count
