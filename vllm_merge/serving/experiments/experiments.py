# SPDX-License-Identifier: Apache-2.0
"""Experiments in one API process: which arm a request gets, what its client is told, and the store behind it.

Assignment looks at nothing but the request and what every API process has alike (trials.py), so it asks nobody and waits for
nothing.
"""

from __future__ import annotations

import asyncio
import atexit
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers

from vllm_merge.experiments.assignment import Assigner, Assignment, Withdrawn, find_unit
from vllm_merge.experiments.pairs import Pair
from vllm_merge.experiments.records import Exposure
from vllm_merge.experiments.running import Running, follow
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tickets import Ticket, signing_key
from vllm_merge.experiments.writer import Writer
from vllm_merge.recipe.experiments import Experiment
from vllm_merge.recipe.schema import BASE
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.names import Name, Names
from vllm_merge.serving.experiments.arms import Arms
from vllm_merge.serving.experiments.exposures import exposure_of
from vllm_merge.serving.experiments.shadow import Shadows
from vllm_merge.serving.experiments.trials import Trials
from vllm_merge.serving.requests.answers import AnswerFacts
from vllm_merge.serving.requests.bodies import Asked
from vllm_merge.serving.requests.refusals import Refused
from vllm_merge.serving.routes.admin import ADMIN_HEADER, is_admin
from vllm_merge.serving.settings import store_days

FORCE_HEADER = "x-vllm-merge-force-arm"
_MOST_EARLY = 10_000  # exposures that come before the store is open


@dataclass(frozen=True)
class Chosen:
    """What was chosen for one request. serve: the recipe or adapter that answers, None for the base model. exposure: its id.
    unit: hashed; unit_kind: where it came from. flag_set: the base model, whose experiments these are.
    """

    assignment: Assignment
    version: int
    serve: str | None
    artifact: str
    exposure: str
    unit: str
    unit_kind: str
    flag_set: str

    def ticket(self) -> str:
        chosen = self.assignment
        return Ticket(self.exposure, chosen.flag_key, self.version, chosen.variant, self.unit, chosen.counted).sign()


class Experiments:
    """base: gives what the base model is called here."""

    def __init__(self, front: FrontDoor, base: Callable[[], str]) -> None:
        self.trials = Trials()
        self.store: Store | None = None
        self.writer: Writer | None = None
        self._early: deque[Exposure] = deque(maxlen=_MOST_EARLY)
        self._opening = threading.Lock()
        self.arms = Arms(front)
        self.shadows = Shadows(front, lambda: self.trials, self._keep)
        self._front, self._base = front, base
        self._assigners: dict[str, Assigner] = {}
        self._withdrawn: dict[str, Withdrawn] = {}
        self._behind: dict[str, list[str]] = {}  # alias -> experiments

    # -- what runs ------------------------------------------------------------------------------------------------------

    async def resolve(self, names: Names) -> Trials:
        """What the recipe file's experiments are now: each with its version, from the store, and what was decided.

        Raises UserInputError (no key, no store), MergeError where the store does not answer.
        """
        wanted = names.recipes.experiments
        if not wanted:
            return Trials()
        artifacts = {name: self._artifacts(experiment, names.names) for name, experiment in wanted.items()}
        return await asyncio.to_thread(self._define, wanted, artifacts)

    def open_store(self) -> Store:
        """The store, opened the first time that it is needed. Raises MergeError."""
        with self._opening:
            if self.store is None:
                signing_key()
                store = Store.open()
                self.writer = Writer(store, keep_days=store_days())
                atexit.register(self.writer.close)
                while self._early:
                    self.writer.put(self._early.popleft())
                self.store = store
            return self.store

    def record(self, facts: AnswerFacts, chosen: Chosen) -> None:
        """Hand over the exposure of an answer that has ended; one that comes before the store is open waits for it."""
        exposure = exposure_of(facts, chosen)
        if exposure is not None:
            (self._early.append if self.writer is None else self.writer.put)(exposure)

    def _keep(self, pair: Pair) -> None:
        if self.writer is not None:  # always: nothing is compared before a definition came from the store
            self.writer.put(pair)

    def _define(self, wanted: Mapping[str, Experiment], artifacts: Mapping[str, Mapping[str, str]]) -> Trials:
        store = self.open_store()
        running = {}
        for name, experiment in wanted.items():
            newest = store.definition(name)
            before = Running.from_document(name, newest.version, newest.document) if newest is not None else None
            document = follow(name, experiment, artifacts[name], before).to_document()
            defined = store.define(name, document)
            running[name] = Running.from_document(name, defined.version, defined.document)
        return Trials(running).with_decisions(store.decisions())

    def _artifacts(self, experiment: Experiment, names: Mapping[str, Name]) -> dict[str, str]:
        found = {}
        for arm, entry in experiment.arms.items():
            known = names.get(entry.serve)
            found[arm] = known.label if known is not None else self._name_of(entry.serve)
        return found

    def _name_of(self, serve: str) -> str:
        return self._base() if serve == BASE else serve

    def adopt(self, trials: Trials) -> None:
        """Assign by these from now on."""
        self._assigners = {name: Assigner(running) for name, running in trials.running.items()}
        self._withdrawn = {name: trials.withdrawn(name) for name in trials.running}
        self._behind = {}
        for name, running in trials.running.items():
            alias = running.experiment.alias
            if alias is not None and self._withdrawn[name].settled is None:
                self._behind.setdefault(alias, []).append(name)
        self.trials = trials
        self.shadows.look_at(trials)

    # -- requests -------------------------------------------------------------------------------------------------------

    def choose(self, asked: Asked) -> Chosen | None:
        """The arm for a request; None for one that is in no experiment. Raises Refused for an arm that it may not force."""
        name = asked.model
        if name in self._assigners:
            names = [name]
        elif name in self._behind:
            names = self._behind[name]
        else:
            return None
        headers = Headers(scope=asked.scope)
        exposure = secrets.token_hex(16)
        for candidate in names:
            assigner = self._assigners[candidate]
            running = assigner.running
            unit = find_unit(running.experiment.unit, headers.get, asked.document or {}, exposure)
            if len(names) > 1 and not assigner.takes(unit.value):
                continue
            forced = _forced(headers, running) if FORCE_HEADER in headers else None
            found = assigner.assign(unit.value, time.time(), self._withdrawn[candidate], forced)
            entry = running.experiment.arms[found.variant]
            serve = entry.serve if entry.serve in self._front.names else None
            artifact = running.artifacts[found.variant] or entry.serve
            hashed = assigner.hashed(unit)
            return Chosen(found, running.version, serve, artifact, exposure, hashed, unit.kind, self._base())
        return None


def _forced(headers: Headers, running: Running) -> str:
    """The arm that a holder of the admin token asks for. Raises Refused."""
    arm = headers[FORCE_HEADER]
    if not is_admin(headers.get(ADMIN_HEADER)):
        raise Refused(
            403, "permission_error", FORCE_HEADER, f"{FORCE_HEADER} is for holders of the admin token ({ADMIN_HEADER})"
        )
    if arm not in running.experiment.arms:
        arms = ", ".join(running.experiment.arms)
        raise Refused(400, "invalid_request_error", FORCE_HEADER, f"{running.name} has no arm {arm!r} (arms: {arms})")
    return arm
