# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness by name, asked of candidates through the search's own requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.search.candidates import Candidate
from vllm_merge.search.endpoint import Endpoint
from vllm_merge.search.examples import in_turns
from vllm_merge.search.metrics import Post, answer_logprobs

INSTALL = "--lm-eval: lm-evaluation-harness is not installed; install it with `pip install 'lm-eval>=0.4.10'`"
SAME = 1234  # the harness seeds everything with this itself


class HarnessScorer:
    """Documents of the harness's tasks. limit: of each task at most so many. include: a folder with more tasks.

    The harness keeps global state, so one candidate is evaluated at a time; its requests are side by side.
    """

    shares = False  # metrics may be anything

    def __init__(
        self, endpoint: Endpoint, names: Sequence[str], limit: int, seed: int, at_once: int, include: Path | None = None
    ) -> None:
        """Raises UserInputError where the harness is not installed, or a task is none of it."""
        try:
            simple_evaluate = import_module("lm_eval").simple_evaluate
            task_manager = import_module("lm_eval.tasks").TaskManager
        except ImportError:
            raise UserInputError(INSTALL) from None
        self._evaluate = simple_evaluate
        self._manager = task_manager(include_path=str(include) if include is not None else None)
        self._endpoint, self._lock = endpoint, threading.Lock()
        self._pool = ThreadPoolExecutor(at_once)
        try:
            loaded = self._manager.load(list(names))["tasks"]
        except Exception as error:  # whatever a task's file or data set raises
            raise UserInputError(f"--lm-eval {','.join(names)}: {type(error).__name__}: {str(error)[:500]}") from None
        all_documents = [(task, i) for task, made in loaded.items() for i in range(min(limit, len(made.eval_docs)))]
        if not all_documents:
            raise UserInputError(f"--lm-eval {','.join(names)}: has no documents")
        self._documents = [all_documents[i] for i in in_turns([task for task, _ in all_documents], seed)]

    @property
    def tasks(self) -> Sequence[str]:
        return [task for task, _ in self._documents]

    def values(self, candidate: Candidate, start: int, end: int) -> list[float]:
        """Each document's first metric, negative where less is better."""
        return self.values_of(candidate.name, start, end)

    def values_of(self, model: str, start: int, end: int) -> list[float]:
        """`values` of any model name of the server."""
        wanted = self._documents[start:end]
        samples: dict[str, list[int]] = {}
        for task, document in wanted:
            samples.setdefault(task, []).append(document)
        with self._lock:
            asked = _language_model(self._endpoint, model, self._pool)
            found = self._evaluate(
                model=asked,
                tasks=list(samples),
                samples=samples,
                task_manager=self._manager,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=SAME,
            )
        values = {
            (task, row["doc_id"]): _value(task, row, found["higher_is_better"][task])
            for task in samples
            for row in reversed(found["samples"][task])  # the first filter's row is kept
        }
        return [values[document] for document in wanted]

    def close(self) -> None:
        """Nothing is asked any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _value(task: str, row: dict[str, Any], better: dict[str, bool]) -> float:
    metric = row["metrics"][0]
    value = row[metric]
    if not isinstance(value, int | float):
        raise UserInputError(
            f"--lm-eval {task}: its metric {metric} has no value for a single document; take another task"
        )
    return float(value) if better.get(metric, True) else -float(value)


def _language_model(endpoint: Endpoint, name: str, pool: ThreadPoolExecutor) -> Any:
    """A model as the harness wants one."""
    base: Any = import_module("lm_eval.api.model").LM

    class Served(base):  # type: ignore[misc]
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            def ask(post: Post, request: Any) -> tuple[float, bool]:
                values, likeliest = answer_logprobs(post, name, *request.args[:2])
                return sum(values), likeliest

            return _side_by_side(endpoint, pool, ask, requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            def ask(post: Post, request: Any) -> float:
                return sum(answer_logprobs(post, name, "", request.args[0])[0])

            return _side_by_side(endpoint, pool, ask, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            def ask(post: Post, request: Any) -> str:
                prompt, wanted = request.args[:2]
                until = wanted.get("until") or []
                stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
                tokens = wanted.get("max_gen_toks", 256)
                body = {"model": name, "prompt": prompt, "max_tokens": tokens, "stop": stops[:4]}
                body["temperature"] = wanted.get("temperature", 0) if wanted.get("do_sample") else 0
                reply = post("/completions", body)
                try:
                    return str(reply["choices"][0]["text"])
                except (KeyError, IndexError, TypeError):
                    raise MergeError(f"the answer of {name} is not one of OpenAI's interface") from None

            return _side_by_side(endpoint, pool, ask, requests)

    return Served()


def _side_by_side(
    endpoint: Endpoint, pool: ThreadPoolExecutor, ask: Callable[[Post, Any], Any], requests: Sequence[Any]
) -> list[Any]:
    """The first request alone: it has the candidate merged."""
    values = [ask(partial(endpoint.post, alone=True), request) for request in requests[:1]]
    waiting = [pool.submit(ask, endpoint.post, request) for request in requests[1:]]
    try:
        return values + [future.result() for future in waiting]
    finally:
        for future in waiting:
            future.cancel()
