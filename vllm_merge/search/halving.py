# SPDX-License-Identifier: Apache-2.0
"""The search itself: candidates answer the same examples side by side, rung by rung, and the better ones go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.search.budget import Ended
from vllm_merge.search.candidates import Candidate
from vllm_merge.search.log import Log
from vllm_merge.search.rungs import Rung
from vllm_merge.search.scores import Estimates, estimate


class Scorer(Protocol):
    """Asks a candidate. tasks: of the examples, in the order in which they are asked. shares: see Metric."""

    @property
    def tasks(self) -> Sequence[str]: ...

    @property
    def shares(self) -> bool: ...

    def values(self, candidate: Candidate, start: int, end: int) -> list[float]:
        """Of examples `start` to `end`; more is better. Raises MergeError for a candidate that cannot be asked, Ended where the
        search is over, UserInputError where nothing can be asked."""
        ...


@dataclass
class Found:
    """What a search found. ranking: candidates, best first; by the rung that they reached, then by their mean there.

    estimates: of each candidate that finished a rung, on all that it answered. rung: the latest that each finished, from 1.
    ended: why it ended before its last step; empty where it did not.
    """

    ranking: list[Candidate] = field(default_factory=list)
    estimates: dict[int, Estimates] = field(default_factory=dict)
    rung: dict[int, int] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    ended: str = ""

    @property
    def best(self) -> Candidate | None:
        """The best so far; None before any has finished the first rung."""
        return self.ranking[0] if self.ranking else None


class Halving:
    """One search. together: candidates that are asked side by side. notify(what, done, total)."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        rungs: Sequence[Rung],
        scorer: Scorer,
        log: Log,
        *,
        together: int,
        notify: Callable[[str, int, int], None],
    ) -> None:
        self._candidates, self._rungs, self._scorer, self._log = candidates, rungs, scorer, log
        self._together, self._notify = together, notify
        self._values = {c.number: list(log.kept.values.get(c.number, [])) for c in candidates}
        self._found = Found(failures=dict(log.kept.failures))

    def run(self) -> Found:
        """Search until the last rung, or until the budget ends. Raises UserInputError where the server cannot be asked."""
        alive = [candidate for candidate in self._candidates if candidate.number not in self._found.failures]
        try:
            for step, rung in enumerate(self._rungs, 1):
                alive = alive[: rung.candidates]
                self._climb(alive, step, rung)
                alive = [c for c in self._found.ranking if self._found.rung[c.number] == step]
                if not alive:
                    break
        except Ended as ended:
            self._found.ended = ended.reason
        return self._found

    def _climb(self, alive: Sequence[Candidate], step: int, rung: Rung) -> None:
        """Ask these candidates as many examples as the rung has."""
        what = f"Rung {step} of {len(self._rungs)}: {rung.examples} examples"
        finished = 0
        with ThreadPoolExecutor(self._together) as pool:
            waiting = {pool.submit(self._complete, candidate, rung.examples): candidate for candidate in alive}
            self._notify(what, 0, len(waiting))
            try:
                while waiting:
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED, timeout=0.5)
                    for future in done:
                        self._take(future, waiting.pop(future), step, rung)
                        finished += 1
                    self._notify(what, finished, finished + len(waiting))
            finally:
                # What was asked to the end counts, whatever ended the others.
                pool.shutdown(wait=True, cancel_futures=True)
                for future, candidate in waiting.items():
                    if future.done() and not future.cancelled() and future.exception() is None:
                        self._take(future, candidate, step, rung)

    def _complete(self, candidate: Candidate, examples: int) -> None:
        values = self._values[candidate.number]
        if len(values) < examples:
            new = self._scorer.values(candidate, len(values), examples)
            self._log.add_values(candidate.number, len(values), new)
            values += new

    def _take(self, future: Future[None], candidate: Candidate, step: int, rung: Rung) -> None:
        found, number = self._found, candidate.number
        try:
            future.result()
        except UserInputError:
            raise
        except MergeError as error:
            found.failures[number] = str(error)
            self._log.add_failure(number, str(error))
            found.ranking = [c for c in found.ranking if c.number != number]
            return
        values = self._values[number][: rung.examples]  # a search that goes on may have later ones already
        found.rung[number] = step
        found.estimates[number] = estimate(self._scorer.tasks[: len(values)], values, shares=self._scorer.shares)
        ranked = [*(c for c in found.ranking if c.number != number), candidate]
        found.ranking = sorted(
            ranked, key=lambda c: (-found.rung[c.number], -found.estimates[c.number].mean.mean, c.number)
        )
