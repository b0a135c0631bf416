# SPDX-License-Identifier: Apache-2.0
"""A search from its request to its facts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_merge.errors import MergeError
from vllm_merge.methods.registry import default_registry
from vllm_merge.search.budget import Budget, Ended
from vllm_merge.search.candidates import Arm, Candidate, Space, as_name, scaled
from vllm_merge.search.endpoint import Endpoint
from vllm_merge.search.halving import Found, Halving, Scorer
from vllm_merge.search.log import Log
from vllm_merge.search.rungs import Rung, fit
from vllm_merge.search.scores import Estimates, estimate
from vllm_merge.search.served import Served
from vllm_merge.search.sizes import measure

Notify = Callable[[str, int, int], None]
SLOWED = (
    "the server begins {rate} merges of requests a minute at most, and the search waited for it; VLLM_MERGE_ADHOC=rate={more} "
    "makes it quicker"
)


class NamedScorer(Scorer, Protocol):
    """A scorer that also asks what has a name on the server already."""

    def values_of(self, model: str, start: int, end: int) -> list[float]: ...


@dataclass(frozen=True)
class Request:
    """What is searched. about: what values are of (metric, data, seeds), for the log and the record.

    answers: how many examples may be answered, None for any number. against: a name that the best is compared with.
    """

    space: Space
    candidates: int
    eta: int
    answers: int | None
    about: Mapping[str, Any]
    log: Path | None = None
    resume: bool = False
    against: str | None = None


@dataclass(frozen=True)
class Result:
    """What came out. rungs: as planned. against: the estimates of the name that the best was compared with, on what it answered."""

    found: Found
    candidates: Sequence[Candidate]
    rungs: Sequence[Rung]
    notes: Sequence[str]
    against: Estimates | None
    requests: int
    seconds: float

    @property
    def best(self) -> Candidate | None:
        return self.found.best

    def facts(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        best = self.best
        return {
            "best": None if best is None else self._row(best),
            "against": None if self.against is None else self.against.to_dict(),
            "candidates": [self._row(candidate) for candidate in self._in_order()],
            "rungs": [asdict(rung) for rung in self.rungs],
            "ended": self.found.ended or None,
            "requests": self.requests,
            "seconds": round(self.seconds, 2),
            "notes": list(self.notes),
        }

    def _in_order(self) -> list[Candidate]:
        ranked = {candidate.number for candidate in self.found.ranking}
        return [*self.found.ranking, *(c for c in self.candidates if c.number not in ranked)]

    def _row(self, candidate: Candidate) -> dict[str, Any]:
        estimates = self.found.estimates.get(candidate.number)
        return {
            "number": candidate.number,
            "recipe": dict(candidate.recipe),
            "size": candidate.size,
            "rung": self.found.rung.get(candidate.number),
            "estimates": None if estimates is None else estimates.to_dict(),
            "failed": self.found.failures.get(candidate.number),
        }


def run(
    request: Request, served: Served, endpoint: Endpoint, scorer: NamedScorer, budget: Budget, notify: Notify
) -> Result:
    """Search. Raises UserInputError for a wrong request, MergeError where nothing could be tried."""
    arms = request.space.arms(default_registry())
    tasks = scorer.tasks
    rungs = fit(request.candidates, len(tasks), len(set(tasks)), request.eta, _answers(request, arms, len(tasks)))
    log = Log(request.log, _identity(request, served), resume=request.resume)
    try:
        if log.kept.candidates:
            candidates, notes = log.kept.candidates, log.kept.notes
        else:
            notify("Measuring methods", 0, 0)
            try:
                candidates, failures, notes = _drawn(request, arms, served, endpoint)
            except Ended as ended:
                return Result(Found(ended=ended.reason), [], rungs, [], None, budget.requests, budget.seconds)
            log.kept.failures |= failures
            log.add_candidates(candidates, failures, notes)
        if served.rate <= len(candidates):
            notes = [*notes, SLOWED.format(rate=served.rate, more=4 * len(candidates))]
        for candidate in candidates:
            as_name(candidate.recipe)
        halving = Halving(candidates, rungs, scorer, log, together=served.together, notify=notify)
        found = halving.run()
        if not found.ranking and not found.ended:
            raise MergeError(f"every candidate failed; the first: {next(iter(found.failures.values()), '')}")
        against = _against(request, scorer, found)
        return Result(found, candidates, rungs, notes, against, budget.requests, budget.seconds)
    finally:
        log.close()


def _answers(request: Request, arms: Sequence[Arm], examples: int) -> int | None:
    """What of the budget is left for candidates: measuring methods and the comparison take some."""
    if request.answers is None:
        return None
    return request.answers - min(len(arms), request.candidates) - (examples if request.against else 0)


def _drawn(
    request: Request, arms: Sequence[Arm], served: Served, endpoint: Endpoint
) -> tuple[list[Candidate], dict[int, str], list[str]]:
    """The candidates with their λ; which of them cannot be made, and why."""
    drawn = request.space.draw(arms, request.candidates)
    used = {arm.name: arm for arm, candidate in drawn if candidate.size is not None}
    sizes = measure(endpoint, list(used.values()), request.space.adapters, served.together)
    candidates, failures, notes = [], {}, []
    for arm, candidate in drawn:
        size = sizes.get(arm.name, 1.0)
        if isinstance(size, str):
            failures[candidate.number] = size
        candidates.append(scaled(candidate, size if isinstance(size, float) else 1.0))
    notes += [f"{name} was left out: {reason}" for name, reason in sizes.items() if isinstance(reason, str)]
    return candidates, failures, notes


def _against(request: Request, scorer: NamedScorer, found: Found) -> Estimates | None:
    """The estimates of the name that the best is compared with, on the examples that the best answered."""
    if request.against is None or found.best is None:
        return None
    count = found.estimates[found.best.number].mean.count
    try:
        values = scorer.values_of(request.against, 0, count)
    except Ended as ended:
        found.ended = found.ended or ended.reason
        return None
    return estimate(scorer.tasks[:count], values, shares=scorer.shares)


def _identity(request: Request, served: Served) -> dict[str, Any]:
    space = request.space
    return {
        "model": served.model,
        "adapters": served.adapters,
        "candidates": request.candidates,
        "eta": request.eta,
        "methods": space.methods,
        "spaces": space.spaces,
        "parameters": {name: repr(dimension) for name, dimension in space.parameters.items()},
        "ranks": list(space.ranks),
        "auto": space.auto,
        "seed": space.seed,
        **request.about,
    }


def recipe_name(recipe: Mapping[str, Any]) -> str:
    """What a found recipe is called where nobody says: its method, and digits of its content."""
    text = json.dumps(recipe, sort_keys=True)
    return f"{recipe['merge_method']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"[:64]
