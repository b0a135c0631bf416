# SPDX-License-Identifier: Apache-2.0
"""When a worker did what for one merge: what its metrics count, and what the API process makes spans of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timeline:
    """The steps of one merge, as a worker takes them."""

    steps: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """The block is a step."""
        began, started = time.time(), time.perf_counter()
        yield
        self.add(name, began, time.perf_counter() - started)

    def add(self, name: str, began: float, seconds: float, stages: Mapping[str, float] | None = None) -> None:
        """began: seconds since 1970. stages: seconds of the parts of the step, which may take turns."""
        self.steps.append({"name": name, "began": began, "seconds": seconds, "stages": dict(stages or {})})

    def stages(self) -> dict[str, float]:
        """{stage: seconds}, a step without stages being one."""
        return {
            stage: seconds
            for step in self.steps
            for stage, seconds in (step["stages"] or {step["name"]: step["seconds"]}).items()
        }
