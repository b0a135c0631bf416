# SPDX-License-Identifier: Apache-2.0
"""What a finished or running experiment tells the planner of the next one."""

from __future__ import annotations

import math

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.measures import MEASURES
from vllm_merge.experiments.planner import Baseline
from vllm_merge.experiments.readings import Readings
from vllm_merge.experiments.report import find
from vllm_merge.experiments.statistics.estimate import ratio
from vllm_merge.experiments.store import Store


def baseline_like(store: Store, name: str) -> Baseline:
    """Control's primary metric as it was: its value, and the deviation of one unit. Raises UserInputError, StoreError."""
    running = find(store, name)
    primary, control = running.experiment.primary, running.experiment.control_arm
    if primary is None:
        raise UserInputError(f"experiment {name} has no primary metric; give --share, or --mean and --deviation")
    versions = store.versions(name, running.version)
    with store.reading() as connection:
        readings = Readings(connection, name, versions)
        measure = MEASURES.get(primary.metric)
        sums = readings.measures([measure])[measure.name] if measure else readings.outcome(primary.metric)
    estimate = ratio(sums[control]) if control in sums else None
    if estimate is None or not math.isfinite(estimate.value) or not estimate.variance > 0:
        raise UserInputError(f"experiment {name}: too little is known of {primary.metric} in {control} yet")
    return Baseline.of_mean(float(estimate.value), math.sqrt(estimate.variance * estimate.units))
