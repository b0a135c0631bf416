# SPDX-License-Identifier: Apache-2.0
"""What one API process does for all while experiments run: it looks at the guardrails, and at what other replicas decided.

A breach is written to the store first, where the first replica's word counts, and then obeyed by every API process at once.
Other replicas read it there. So a decision outlives every process, and a replica that starts later knows it.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import State

from vllm_merge.errors import MergeError
from vllm_merge.experiments.guardrails import breaches
from vllm_merge.experiments.records import Decision
from vllm_merge.experiments.store import Store
from vllm_merge.serving.control.control import ControlError
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.experiments.trials import Trials
from vllm_merge.serving.routes.outcomes import OutcomeDesk
from vllm_merge.serving.telemetry import tracing

logger = logging.getLogger("vllm_merge")

POLL_SECONDS = 1.0  # how long a decision of another replica may stay unknown here
GUARD_SECONDS = 5.0  # between two looks at the guardrails
_REST = 20  # times what the last look took: with millions of units it may take seconds


def begin(state: State, published: Published) -> None:
    """Let the routes and the middleware of an API process find the experiments."""
    experiments = published.experiments
    state.vllm_merge_experiments = experiments
    state.vllm_merge_outcomes = OutcomeDesk(lambda: experiments.store)


async def watch(published: Published) -> None:
    """For as long as the server runs."""
    next_look = 0.0
    while True:
        await asyncio.sleep(POLL_SECONDS)
        trials = published.state.trials
        if not trials.running:
            continue
        try:
            if not await published.leads():
                continue
            store = published.experiments.open_store()
            started = time.monotonic()
            if started >= next_look:
                await asyncio.to_thread(guard, store, trials)
                took = time.monotonic() - started
                next_look = started + max(GUARD_SECONDS, _REST * took)
            await published.take_decisions()
        except (MergeError, ControlError) as error:
            logger.warning("experiments: %s", error)
        except Exception:
            logger.exception("could not look after the experiments")


def guard(store: Store, trials: Trials) -> list[Decision]:
    """Decide about every arm that breaks a guardrail and still has traffic. Returns what is new. Raises StoreError."""
    made = []
    for name, running in trials.running.items():
        definition = store.definition(name, running.version)
        if definition is None or trials.settled(name) is not None or not running.experiment.guardrails:
            continue
        withdrawn = trials.withdrawn(name).breached
        for breach in breaches(store, definition):
            if breach.arm in withdrawn:
                continue
            now = time.time()
            decision = Decision(name, running.version, "breach", now, breach.arm, breach.guardrail, breach.reason)
            if store.decide(decision):
                made.append(decision)
                logger.error(
                    "experiment %s: arm %s breaks %s and loses its traffic to control: %s",
                    name,
                    breach.arm,
                    breach.guardrail,
                    breach.reason,
                )
                _trace(decision)
    return made


def _trace(decision: Decision) -> None:
    if (tracer := tracing.tracer()) is not None:
        attributes = {
            "feature_flag.key": decision.experiment,
            "feature_flag.result.variant": decision.arm,
            "feature_flag.version": str(decision.version),
            "vllm_merge.guardrail": decision.guardrail,
            "vllm_merge.reason": decision.reason,
        }
        tracer.start_span("vllm_merge.breach", attributes=attributes).end()
