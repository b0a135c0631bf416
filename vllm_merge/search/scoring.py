# SPDX-License-Identifier: Apache-2.0
"""Candidates asked one example after another, many at once, so that a server answers them in the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from vllm_merge.evaluation.tasks import Example
from vllm_merge.search.candidates import Candidate
from vllm_merge.search.endpoint import Endpoint
from vllm_merge.search.metrics import Metric


class ExampleScorer:
    """Examples in the order in which they are asked. at_once: requests under way, of all candidates together."""

    def __init__(self, endpoint: Endpoint, metric: Metric, examples: Sequence[Example], at_once: int) -> None:
        self._endpoint, self._metric, self._examples = endpoint, metric, examples
        self._pool = ThreadPoolExecutor(at_once)

    @property
    def tasks(self) -> Sequence[str]:
        return [example.task for example in self._examples]

    @property
    def shares(self) -> bool:
        return self._metric.shares

    def values(self, candidate: Candidate, start: int, end: int) -> list[float]:
        """The first example alone: it has the candidate merged. Where that has to wait, no other candidate does."""
        return self.values_of(candidate.name, start, end)

    def values_of(self, model: str, start: int, end: int) -> list[float]:
        """`values` of any model name of the server."""
        first, *rest = self._examples[start:end]
        alone: Any = partial(self._endpoint.post, alone=True)
        values = [self._metric.value(alone, model, first)]
        waiting = [self._pool.submit(self._metric.value, self._endpoint.post, model, example) for example in rest]
        try:
            return values + [future.result() for future in waiting]
        finally:
            for future in waiting:
                future.cancel()

    def close(self) -> None:
        """Nothing is asked any more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
