# SPDX-License-Identifier: Apache-2.0
"""An experiment as it runs: what the recipe file says, which artifact each arm is, and which units each arm has.

This is what the store keeps of each version (`Store.define`), what every process and replica assigns by, and what a report
reads: weights, primary metric and guardrails as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from vllm_merge.experiments.ranges import Interval, first_ranges, next_ranges
from vllm_merge.recipe.experiments import Experiment


@dataclass(frozen=True)
class Running:
    """version: 1, 2, … counts the changes. artifacts: {arm: recipe@digest, or the base model's name}. ranges: of [0, 1)."""

    name: str
    version: int
    experiment: Experiment
    artifacts: Mapping[str, str]
    ranges: Mapping[str, tuple[Interval, ...]]

    def to_document(self) -> dict[str, Any]:
        """JSON data without name and version, which the store keeps beside it."""
        document: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", exclude={"name", "version"})
        if self.experiment.shadow is None:  # documents are older than this key: they shall not become another version
            del document["experiment"]["shadow"]
        return document

    @classmethod
    def from_document(cls, name: str, version: int, document: Mapping[str, Any]) -> Running:
        """The definition that `to_document` wrote. Raises pydantic's ValidationError for anything else."""
        return _ADAPTER.validate_python({"name": name, "version": version, **document})


def follow(name: str, experiment: Experiment, artifacts: Mapping[str, str], before: Running | None) -> Running:
    """What follows `before`, the newest definition; `before` itself where nothing has changed.

    As few units as possible change their arm, unless the seed is another: then everybody is drawn anew. artifacts: "" where an
    arm has none now (its adapter cannot be read); that alone is no change.
    """
    if before is not None:
        artifacts = {arm: artifact or before.artifacts.get(arm, "") for arm, artifact in artifacts.items()}
    if before is not None and before.experiment == experiment and before.artifacts == artifacts:
        return before
    ranges: Mapping[str, tuple[Interval, ...]]
    if before is None or (before.experiment.seed or name) != (experiment.seed or name):
        ranges = first_ranges(experiment.weights, experiment.coverage)
    elif _shares(before.experiment) == _shares(experiment):
        ranges = before.ranges
    else:
        ranges = next_ranges(before.ranges, experiment.weights, experiment.coverage)
    return Running(name, before.version + 1 if before else 1, experiment, dict(artifacts), dict(ranges))


def _shares(experiment: Experiment) -> tuple[Mapping[str, float], float]:
    return experiment.weights, experiment.coverage


_ADAPTER = TypeAdapter(Running)
