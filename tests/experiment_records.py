# SPDX-License-Identifier: Apache-2.0
"""Rows of experiments for the tests: each good as it is, and changed by keyword."""

from vllm_merge.experiments.pairs import Pair
from vllm_merge.experiments.records import Exposure, Outcome
from vllm_merge.experiments.running import follow
from vllm_merge.experiments.store import Store
from vllm_merge.recipe.experiments import Experiment


def exposure(number: int, arm: str = "a", **changes) -> Exposure:
    """An exposure of its own unit that went well."""
    usual = {
        "id": f"{number:032x}",
        "at": 1_700_000_000.0 + number,
        "experiment": "ab",
        "version": 1,
        "arm": arm,
        "artifact": f"{arm}@0123456789ab",
        "reason": "SPLIT",
        "unit": f"{number:032x}",
        "unit_kind": "user",
        "status": 200,
        "finish": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "first_token": 0.1,
        "gap_mean": 0.02,
        "gap_p99": 0.03,
        "gap_max": 0.04,
        "seconds": 0.5,
        "streaming": True,
    }
    return Exposure(**(usual | changes))


def outcome(number: int, value: float = 1.0, **changes) -> Outcome:
    """What came of exposure `number`."""
    usual = {
        "id": f"outcome {number}",
        "at": 1_700_000_001.0 + number,
        "experiment": "ab",
        "metric": "score",
        "value": value,
        "exposure": f"{number:032x}",
        "version": 1,
        "arm": "a",
        "unit": f"{number:032x}",
    }
    return Outcome(**(usual | changes))


def pair(number: int, arm: str = "a", shadow: str = "b", **changes) -> Pair:
    """Exposure `number`, which another arm answered as well."""
    usual = {
        "exposure": f"{number:032x}",
        "at": 1_700_000_000.0 + number,
        "experiment": "ab",
        "version": 1,
        "arm": arm,
        "shadow": shadow,
        "outcome": "ok",
        "unit": f"{number:032x}",
        "streaming": True,
        "tokens": 20,
        "shadow_tokens": 22,
        "agreement": 0.5,
        "equal": False,
        "seconds": 0.5,
        "shadow_seconds": 0.6,
        "first_token": 0.1,
        "shadow_first_token": 0.1,
        "positions": 8,
        "kl": 0.2,
        "missing": 0.05,
        "shadow_missing": 0.1,
        "preferred": 1.0,
    }
    return Pair(**(usual | changes))


def define(store: Store, name: str = "ab", **changes) -> Experiment:
    """Let the store have an experiment of arms a (control) and b."""
    given = {"arms": {"a": 50, "b": 50}, "primary": {"metric": "score"}} | changes
    made = Experiment.model_validate(given)
    store.define(name, follow(name, made, {arm: f"{arm}@0123456789ab" for arm in made.arms}, None).to_document())
    return made
