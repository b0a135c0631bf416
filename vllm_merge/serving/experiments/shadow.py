# SPDX-License-Identifier: Apache-2.0
"""Some requests of an experiment are answered by its other arms as well, and both answers compared.

A comparison begins when the client has its answer, so it delays nobody who is compared, and runs beside everybody else's requests at
a bounded cost: a sampled share, `at_once` requests of each experiment, none while `busy_at` requests of clients run, none larger
than `shadow_requests` allows, none for longer than MOST_SECONDS. What is dropped for that is counted. Text is kept nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp

from vllm_merge.experiments.divergence import truncated_kl
from vllm_merge.experiments.pairs import OK, Pair, agreement
from vllm_merge.recipe.experiments import Shadow
from vllm_merge.serving.control.front import ArtifactUnavailable, FrontDoor
from vllm_merge.serving.experiments.judge import Judge, JudgeFailed
from vllm_merge.serving.experiments.shadow_calls import Answer, CallFailed, Inside
from vllm_merge.serving.experiments.shadow_requests import comparable, question
from vllm_merge.serving.experiments.trials import Trials
from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.requests.bodies import Asked
from vllm_merge.serving.requests.outcome import Tape
from vllm_merge.serving.settings import JUDGE_VARIABLE, JudgeSettings

if TYPE_CHECKING:
    from vllm_merge.serving.experiments.experiments import Chosen

logger = logging.getLogger("vllm_merge")

MOST_SECONDS = 120.0  # that one arm may take
POSITIONS = 8  # of an answer, at which distributions are compared


@dataclass(frozen=True)
class Sample:
    """A request that was drawn. arms: {arm that is to answer as well: its model name}. own: the model name of the arm that answers
    its client. tape: of what that arm says.
    """

    shadow: Shadow
    inside: Inside
    path: str
    document: Mapping[str, Any]
    chosen: Chosen
    own: str
    arms: Mapping[str, str]
    tape: Tape


class Shadows:
    """Comparisons of one API process. trials: gives the experiments that run. keep: takes every pair."""

    def __init__(self, front: FrontDoor, trials: Callable[[], Trials], keep: Callable[[Pair], None]) -> None:
        self.running = 0  # requests of clients
        self.note: Callable[[str, str, str], None] = lambda experiment, shadow, outcome: None
        self._front, self._trials, self._keep = front, trials, keep
        self._judge = Judge(settings) if (settings := JudgeSettings.read()) is not None else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._at_once: Counter[str] = Counter()  # by experiment

    def look_at(self, trials: Trials) -> None:
        """Say it where an experiment wants a judge and there is none."""
        for name, running in trials.running.items():
            shadow = running.experiment.shadow
            if self._judge is None and shadow is not None and "judge" in shadow.compare:
                logger.warning("experiment %s: nothing is judged: %s names no judge", name, JUDGE_VARIABLE)

    @contextmanager
    def client(self) -> Iterator[None]:
        """While a client's request is answered."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def sample(self, app: ASGIApp, asked: Asked, path: str, chosen: Chosen) -> Sample | None:
        """What is needed to compare the answer to a request; None for one that is not drawn, or cannot be compared."""
        found = chosen.assignment
        running = self._trials().running.get(found.flag_key)
        shadow = running.experiment.shadow if running is not None else None
        if running is None or shadow is None or not found.counted or drawn(chosen.exposure) >= shadow.share:
            return None
        document = comparable(path, asked)
        if document is None:
            return None
        wanted = running.experiment.arms if shadow.arms is None else shadow.arms
        models = {arm: running.artifacts[arm] or entry.serve for arm, entry in running.experiment.arms.items()}
        arms = {arm: models[arm] for arm in wanted if arm != found.variant}
        if not arms:
            return None
        return Sample(shadow, Inside.of(app, asked.scope), path, document, chosen, chosen.artifact, arms, Tape())

    def follow(self, sample: Sample, facts: AnswerFacts) -> None:
        """The client has its answer, or left: compare it, if it is one. Never waits."""
        if facts.status != 200 or facts.error is not None or sample.tape.calls != 1:
            return
        name = sample.chosen.assignment.flag_key
        if self._at_once[name] >= sample.shadow.at_once:
            for arm in sample.arms:
                self._end(self._pair(sample, facts, arm, "too_many"))
            return
        self._at_once[name] += 1
        # A context of its own: it belongs to no client's request and to no trace.
        task = asyncio.get_running_loop().create_task(self._compare(sample, facts), context=Context())
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._done(done, name))

    async def watch(self) -> None:
        """For as long as the server runs; then nothing is compared any more."""
        try:
            await asyncio.Event().wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _done(self, task: asyncio.Task[None], name: str) -> None:
        self._tasks.discard(task)
        self._at_once[name] -= 1

    async def _compare(self, sample: Sample, facts: AnswerFacts) -> None:
        """With one arm after the other."""
        for arm, model in sample.arms.items():
            pair = self._pair(sample, facts, arm, OK)
            try:
                if self.running >= sample.shadow.busy_at:
                    pair = replace(pair, outcome="busy")
                else:
                    async with asyncio.timeout(MOST_SECONDS):
                        pair = await self._ask(sample, pair, model)
            except TimeoutError:
                pair = replace(pair, outcome="timeout")
            except ArtifactUnavailable:
                pair = replace(pair, outcome="unavailable")
            except Exception as error:  # whatever vLLM raises; its words may repeat the request
                said = str(error) if isinstance(error, CallFailed) else type(error).__name__
                logger.warning("experiment %s: %s cannot be compared: %s", pair.experiment, arm, said)
                pair = replace(pair, outcome="failed")
            self._end(pair)

    async def _ask(self, sample: Sample, pair: Pair, model: str) -> Pair:
        request_id = f"shadow-{pair.exposure}-{pair.shadow}"
        async with AsyncExitStack() as leases:
            for name in {model, sample.own}:
                known = self._front.known(name)
                if known is not None and known.digest is not None:
                    artifact = self._front.artifacts[known.digest]
                    await leases.enter_async_context(self._front.hold(artifact, known.label, wait=False))
            if "answers" in sample.shadow.compare:
                answer = await sample.inside.post(sample.path, {**sample.document, "model": model}, request_id)
                mine, theirs = sample.tape.answer, answer.tape.answer
                if "judge" in sample.shadow.compare and self._judge is not None:
                    pair = replace(pair, preferred=await self._judged(self._judge, sample, pair, answer))
                pair = replace(
                    pair,
                    tokens=len(mine),
                    shadow_tokens=len(theirs),
                    agreement=agreement(mine, theirs),
                    equal=mine == theirs,
                    shadow_seconds=answer.facts.seconds,
                    shadow_first_token=answer.facts.first_token,
                )
            if "distributions" in sample.shadow.compare and sample.tape.answer:
                places = positions(pair.exposure, len(sample.tape.answer))
                salt = sample.document.get("cache_salt")
                both = [
                    await sample.inside.distributions(name, sample.tape, places, f"{request_id}-{side}", salt)
                    for side, name in (("own", sample.own), ("other", model))
                ]
                found = [truncated_kl(p, q) for p, q in zip(*both, strict=True)]
                pair = replace(
                    pair,
                    positions=len(found),
                    kl=statistics.fmean(one.kl for one in found),
                    missing=statistics.fmean(one.missing for one in found),
                    shadow_missing=statistics.fmean(one.other_missing for one in found),
                )
        return pair

    async def _judged(self, judge: Judge, sample: Sample, pair: Pair, answer: Answer) -> float | None:
        """None where the judge says nothing of use: the rest of the pair stands."""
        turned = drawn(pair.exposure, "judge") < 0.5
        own, other = ("".join(tape.text) for tape in (sample.tape, answer.tape))
        try:
            return await judge.prefers(question(sample.document), own, other, turned=turned)
        except JudgeFailed as error:
            logger.warning("experiment %s: %s", pair.experiment, error)
            return None

    def _pair(self, sample: Sample, facts: AnswerFacts, arm: str, outcome: str) -> Pair:
        chosen = sample.chosen
        found = chosen.assignment
        return Pair(
            exposure=chosen.exposure,
            at=facts.wall,
            experiment=found.flag_key,
            version=chosen.version,
            arm=found.variant,
            shadow=arm,
            outcome=outcome,
            unit=chosen.unit,
            streaming=facts.streaming,
            seconds=facts.seconds,
            first_token=facts.first_token,
        )

    def _end(self, pair: Pair) -> None:
        self.note(pair.experiment, pair.shadow, pair.outcome)
        self._keep(pair)


def drawn(exposure: str, purpose: str = "shadow") -> float:
    """Where an exposure falls in [0, 1): the same wherever it is asked."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{exposure}".encode()).digest()[:8]) / 2**64


def positions(exposure: str, length: int) -> list[int]:
    """POSITIONS places of an answer, or all there are, drawn by the exposure, rising."""
    return sorted(random.Random(exposure).sample(range(length), min(length, POSITIONS)))
