# SPDX-License-Identifier: Apache-2.0
"""What an answer is worth: the metrics of a search, each a number for one example."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.evaluation.tasks import Example

Post = Callable[[str, dict[str, Any]], dict[str, Any]]  # path, body → the answer; counted, paced, made again where busy

MAX_ANSWER = 20_000  # characters that a judge is shown
JUDGE_TOKENS = 16
JUDGE_PROMPT = """\
Grade an answer from 0 (wrong or useless) to 10 (right and complete).

Question:
{prompt}

Reference answer:
{reference}

Answer to grade:
{answer}

Reply with the number alone.
"""
_GRADE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)")


class Metric(Protocol):
    """requests: that it makes for an example, those to a judge included. shares: whether all values are between 0 and 1."""

    @property
    def requests(self) -> int: ...

    @property
    def shares(self) -> bool: ...

    def value(self, post: Post, model: str, example: Example) -> float:
        """How well the model answers the example; more is better. Raises what `post` raises, and MergeError."""
        ...


@dataclass(frozen=True)
class Asking:
    """How answers are asked for: greedily, of at most max_tokens; chat: the prompt is the message of a user."""

    max_tokens: int
    chat: bool = False

    def text(self, post: Post, model: str, prompt: str) -> str:
        """The answer."""
        common = {"model": model, "max_tokens": self.max_tokens, "temperature": 0}
        try:
            if self.chat:
                messages = [{"role": "user", "content": prompt}]
                reply = post("/chat/completions", {**common, "messages": messages})
                return str(reply["choices"][0]["message"]["content"] or "")
            return str(post("/completions", {**common, "prompt": prompt})["choices"][0]["text"])
        except (KeyError, IndexError, TypeError):
            raise MergeError(f"the answer of {model} is not one of OpenAI's interface") from None


@dataclass(frozen=True)
class Exact:
    """1 where the first line of the answer is the expected one."""

    asking: Asking
    requests: int = 1
    shares: bool = True

    def value(self, post: Post, model: str, example: Example) -> float:
        return float(example.is_right(self.asking.text(post, model, example.prompt)))


@dataclass(frozen=True)
class Regex:
    """1 where what the pattern finds in the answer (its first group, else all of the match) is the expected answer.

    pattern None: each example's answer is a pattern itself, which must be found in the answer.
    """

    asking: Asking
    pattern: re.Pattern[str] | None = None
    requests: int = 1
    shares: bool = True

    def value(self, post: Post, model: str, example: Example) -> float:
        text = self.asking.text(post, model, example.prompt)
        if self.pattern is None:
            return float(re.search(example.answer, text) is not None)
        found = self.pattern.search(text)
        if found is None:
            return 0.0
        kept = found[1] if self.pattern.groups else found[0]
        return float(kept is not None and kept.strip() == example.answer.strip())


def checked_pattern(text: str, where: str) -> re.Pattern[str]:
    """The pattern. Raises UserInputError."""
    try:
        return re.compile(text)
    except re.error as error:
        raise UserInputError(f"{where}: {text!r} is not a regular expression: {error}") from None


@dataclass(frozen=True)
class LogProb:
    """The mean log probability (natural) of the expected answer's tokens behind the prompt; 0 is certainty.

    Prompt and answer are joined as they stand, so an answer that begins with a space says so itself.
    """

    requests: int = 1
    shares: bool = False

    def value(self, post: Post, model: str, example: Example) -> float:
        return sum(values := answer_logprobs(post, model, example.prompt, example.answer)[0]) / len(values)


def answer_logprobs(post: Post, model: str, prompt: str, answer: str) -> tuple[list[float], bool]:
    """The log probability of each token of the answer behind the prompt, and whether each was the likeliest.

    A token that reaches over the border counts. Raises MergeError where the server gives none.
    """
    body = {"model": model, "prompt": prompt + answer, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    reply = post("/completions", body)
    taken: list[float] = []
    likeliest = True
    try:
        found = reply["choices"][0]["logprobs"]
        rows = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))[:-1]
        left = len(answer)  # counted from the end, as the prompt may begin with tokens that are no text of it
        while left > 0 and rows:
            token, value, top = rows.pop()
            left -= len(token)
            if value is not None:
                taken.append(float(value))
                likeliest = likeliest and float(value) >= max(map(float, (top or {}).values()), default=float(value))
    except (KeyError, IndexError, TypeError, ValueError):
        raise MergeError(f"{model}: the server gave no log probabilities of the prompt (echo, logprobs)") from None
    if not taken:
        raise MergeError(f"{model}: no token of the answer {answer[:40]!r} has a log probability")
    return taken[::-1], likeliest


@dataclass(frozen=True)
class Judge:
    """A grade of 0 to 10 by another model, as 0 to 1. What it says without such a number is worth 0."""

    asking: Asking
    post: Post
    model: str
    template: str = JUDGE_PROMPT
    requests: int = 2
    shares: bool = False

    def value(self, post: Post, model: str, example: Example) -> float:
        answer = self.asking.text(post, model, example.prompt)[:MAX_ANSWER]
        # Once: an answer may have such words too.
        parts = re.split(r"(\{prompt\}|\{reference\}|\{answer\})", self.template)
        words = {"{prompt}": example.prompt, "{reference}": example.answer, "{answer}": answer}
        said = Asking(JUDGE_TOKENS, chat=True).text(self.post, self.model, "".join(words.get(p, p) for p in parts))
        found = _GRADE.search(said)
        return min(float(found[1]), 10.0) / 10 if found is not None else 0.0


def read_template(path: Path) -> str:
    """The judge's prompt of a file. Raises UserInputError where it shows no answer."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"--judge-prompt {path}: cannot be read: {error}") from None
    if "{answer}" not in text:
        raise UserInputError(
            f"--judge-prompt {path}: has no {{answer}}; it may have {{prompt}} and {{reference}} as well"
        )
    return text
