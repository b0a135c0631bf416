# SPDX-License-Identifier: Apache-2.0
"""Which versions of an experiment go on with the same units: those that let the same lots fall on the same arms.

A change of coverage, dates, metric or guardrails leaves what was seen as it is. One of arms, weights, artifacts, unit or seed
begins anew: figures from before and after it must not be mixed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_merge.experiments.records import Definition


def phases(definitions: Sequence[Definition]) -> dict[int, int]:
    """{version: the first version of its phase} of one experiment's definitions, in order."""
    found: dict[int, int] = {}
    before, first = "", 0
    for definition in definitions:
        lots = _lots(definition.document)
        if lots != before:
            before, first = lots, definition.version
        found[definition.version] = first
    return found


def _lots(document: Mapping[str, Any]) -> str:
    experiment = document.get("experiment", document)
    arms = experiment.get("arms", {})
    total = sum(arm["weight"] for arm in arms.values()) or 1.0
    shares = {name: [arm["serve"], round(arm["weight"] / total, 12)] for name, arm in arms.items()}
    parts = [shares, document.get("artifacts"), experiment.get("seed"), experiment.get("unit")]
    return json.dumps(parts, sort_keys=True)
