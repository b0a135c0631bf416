# SPDX-License-Identifier: Apache-2.0
"""What the store keeps: one frozen record each for an exposure, an outcome, a definition and a decision.

Times are seconds: `at` since the epoch, durations as measured by the serving process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# OpenFeature's reason for an arm that the unit's hash chose. Others (forced arms, what is not covered, what came after a
# promotion, a stop or a breach) are kept but not counted: nobody drew lots for them.
SPLIT = "SPLIT"
# An error that is not the server's: its client went away.
CLIENT_LEFT = "client_left"
# A finish reason that stands for a refusal.
REFUSED = "content_filter"


@dataclass(frozen=True)
class Exposure:
    """One request that used an arm.

    id: 32 hex digits, also in the response's signed id. version: of the experiment's definition. arm and artifact: what
    answered. unit: the hashed unit, "" where every request is its own. status: HTTP. error: a word, "" if nothing went
    wrong. first_token and gaps: None where the answer was no stream. refused: the answer was seen to be a refusal.
    """

    id: str
    at: float
    experiment: str
    version: int
    arm: str
    artifact: str
    reason: str
    unit: str = ""
    unit_kind: str = "request"
    status: int = 0
    error: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token: float | None = None
    gap_mean: float | None = None
    gap_p99: float | None = None
    gap_max: float | None = None
    seconds: float = 0.0
    streaming: bool = False
    refused: bool = False

    @property
    def cluster(self) -> str:
        """What is drawn by lot and counts once: the unit, or this request."""
        return self.unit or self.id

    @property
    def counted(self) -> bool:
        """Whether the arm was chosen by lot, so that the exposure says something about it."""
        return self.reason.upper() == SPLIT

    @property
    def failed(self) -> bool:
        """Whether the server failed. A wrong request (4xx) and a client that went away say nothing about the arm."""
        return self.status >= 500 or (self.status < 400 and self.error not in ("", CLIENT_LEFT))

    @property
    def refusal(self) -> bool:
        return self.refused or self.finish == REFUSED


@dataclass(frozen=True)
class Outcome:
    """What came of an answer: a score, a thumb (0 or 1) or a label (1 under the metric's name).

    id: the idempotency key. Either `exposure` with what its ticket says (experiment, version, arm, unit), or experiment and
    unit alone (version 0, arm ""): then it counts for the arm that the unit was in. unit: hashed, the exposure's id where every
    request is its own. counted: whether the lot chose the arm of that exposure.
    """

    id: str
    at: float
    experiment: str
    metric: str
    value: float
    label: str = ""
    exposure: str = ""
    version: int = 0
    arm: str = ""
    unit: str = ""
    counted: bool = True


@dataclass(frozen=True)
class Definition:
    """An experiment as it was defined. version: 1, 2, … counts the changes; document: plain JSON."""

    experiment: str
    version: int
    at: float
    document: Mapping[str, Any]


@dataclass(frozen=True)
class Decision:
    """What was decided about an experiment, by whom and why.

    kind: `breach` of a guardrail (arm: the one that broke it), `stop` (by a person), `promote` (arm: the winner).
    guardrail: its name, for a breach. number: the order of decisions, given by the store.
    """

    experiment: str
    version: int
    kind: Literal["breach", "stop", "promote"]
    at: float
    arm: str = ""
    guardrail: str = ""
    reason: str = ""
    number: int = 0
