# SPDX-License-Identifier: Apache-2.0
"""From the options of `vllm-merge search` to what is searched, and how candidates are scored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_merge.cli.search import MetricName
from vllm_merge.errors import UserInputError
from vllm_merge.evaluation.tasks import Example, read_tasks
from vllm_merge.recipe.problems import listed, nearest
from vllm_merge.search import metrics
from vllm_merge.search.budget import Budget
from vllm_merge.search.candidates import Space
from vllm_merge.search.endpoint import Endpoint
from vllm_merge.search.examples import in_turns
from vllm_merge.search.harness import HarnessScorer
from vllm_merge.search.metrics import Metric
from vllm_merge.search.ranges import Dimension, parse
from vllm_merge.search.scoring import ExampleScorer
from vllm_merge.search.served import Served, look

SPACES = ("delta", "core", "knots", "factors")
JUDGE_KEYS = ("JUDGE_API_KEY",)
HARNESS_LIMIT = 100  # documents of each task


@dataclass(frozen=True)
class Asked:
    """How candidates are scored, as the options say."""

    data: Path | None
    lm_eval: str | None
    lm_eval_tasks: Path | None
    metric: MetricName
    pattern: str | None
    judge: str | None
    judge_model: str | None
    judge_prompt: Path | None
    limit: int | None
    max_tokens: int
    chat: bool
    seed: int
    at_once: int


def look_at(endpoint: Endpoint, adapters: str | None, together: int | None, promote: str | None) -> Served:
    """What the server has, for this search. Raises UserInputError."""
    served = look(endpoint, _words("--adapters", adapters))
    if promote is not None and promote not in served.aliases:
        hint = nearest(promote, served.aliases)
        raise UserInputError(f"--promote: the server has no alias {promote!r}{hint} (it has: {listed(served.aliases)})")
    return served if together is None else replace(served, together=together)


def space_of(
    adapters: Sequence[str],
    methods: str | None,
    spaces: str | None,
    parameters: Sequence[str],
    rank: str,
    auto: bool,
    seed: int,
) -> Space:
    """What is searched. Raises UserInputError."""
    chosen = _words("--spaces", spaces)
    if wrong := [space for space in chosen or () if space not in SPACES]:
        raise UserInputError(f"--spaces: {wrong[0]!r} is none; allowed: {', '.join(SPACES)}")
    ranks: list[int | str] = []
    for word in _words("--rank", rank) or []:
        if word != "auto" and not (word.isdecimal() and int(word) > 0):
            raise UserInputError(f"--rank: {word!r} is no rank; allowed: auto, and whole numbers from 1")
        ranks.append(word if word == "auto" else int(word))
    given: dict[str, Dimension] = {}
    for text in parameters:
        name, dimension = parse(text)
        if name in given:
            raise UserInputError(f"--parameter {text}: {name} is given already")
        given[name] = dimension
    if {"size", "lambda"} <= given.keys():
        raise UserInputError("--parameter: give size or lambda; the one decides the other")
    return Space(adapters, _words("--methods", methods), chosen, given, ranks, auto, seed)


def _words(option: str, text: str | None) -> list[str] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UserInputError(f"{option}: {text!r} has an empty name; give names with single commas between")
    return list(dict.fromkeys(words))


def scorer_of(asked: Asked, endpoint: Endpoint, budget: Budget) -> tuple[Any, dict[str, Any], int]:
    """The scorer, what its values are of, and how many requests it makes for an example (of the harness: 1 at least)."""
    if (asked.data is None) == (asked.lm_eval is None):
        raise UserInputError("give --data FILE or --lm-eval TASKS, one of the two")
    if asked.lm_eval is not None:
        if asked.metric != "exact" or asked.chat:
            raise UserInputError(
                "--lm-eval: its tasks have their own metrics and prompts; leave out --metric and --chat"
            )
        names = _words("--lm-eval", asked.lm_eval) or []
        limit = asked.limit or HARNESS_LIMIT
        harness = HarnessScorer(endpoint, names, limit, asked.seed, asked.at_once, asked.lm_eval_tasks)
        return harness, {"metric": "lm-eval", "data": names, "limit": limit}, 1
    assert asked.data is not None
    if asked.lm_eval_tasks is not None:
        raise UserInputError("--lm-eval-tasks: goes with --lm-eval")
    examples = read_tasks(asked.data, asked.limit)
    metric, about = _metric(asked, budget, examples)
    order = in_turns([example.task for example in examples], asked.seed)
    scorer = ExampleScorer(endpoint, metric, [examples[index] for index in order], asked.at_once)
    sha256 = hashlib.sha256(asked.data.read_bytes()).hexdigest()
    about |= {"data": asked.data.name, "sha256": sha256, "limit": asked.limit, "chat": asked.chat}
    return scorer, {**about, "max_tokens": asked.max_tokens}, metric.requests


def _metric(asked: Asked, budget: Budget, examples: Sequence[Example]) -> tuple[Metric, dict[str, Any]]:

    how = metrics.Asking(asked.max_tokens, asked.chat)
    for option, value, goes_with in (
        ("--pattern", asked.pattern, "regex"),
        ("--judge", asked.judge, "judge"),
        ("--judge-model", asked.judge_model, "judge"),
        ("--judge-prompt", asked.judge_prompt, "judge"),
    ):
        if value is not None and asked.metric != goes_with:
            raise UserInputError(f"{option}: goes with --metric {goes_with}")
    if asked.metric == "exact":
        return metrics.Exact(how), {"metric": "exact"}
    if asked.metric == "regex":
        if asked.pattern is not None:
            return metrics.Regex(how, metrics.checked_pattern(asked.pattern, "--pattern")), {
                "metric": "regex",
                "pattern": asked.pattern,
            }
        for example in examples:
            metrics.checked_pattern(example.answer, f"{asked.data}: the answer of {example.prompt[:40]!r}")
        return metrics.Regex(how), {"metric": "regex"}
    if asked.metric == "logprob":
        if asked.chat:
            raise UserInputError(
                "--chat: has no place with --metric logprob; prompt and answer are joined as they stand"
            )
        return metrics.LogProb(), {"metric": "logprob"}
    if asked.judge is None or asked.judge_model is None:
        raise UserInputError("--metric judge: give --judge URL and --judge-model NAME")
    template = metrics.JUDGE_PROMPT if asked.judge_prompt is None else metrics.read_template(asked.judge_prompt)
    judge = Endpoint(asked.judge, budget, asked.at_once, option="--judge", keys=JUDGE_KEYS)
    about = {"metric": "judge", "judge": asked.judge_model, "judge_prompt": template}
    return metrics.Judge(how, judge.post, asked.judge_model, template), about
