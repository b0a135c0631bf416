# SPDX-License-Identifier: Apache-2.0
"""An outcome as a client writes it: read, checked, and joined with its exposure or unit."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.hashing import unit_hash
from vllm_merge.experiments.measures import MEASURES
from vllm_merge.experiments.records import Definition, Outcome
from vllm_merge.experiments.tickets import read_ticket
from vllm_merge.recipe.problems import suggested
from vllm_merge.recipe.values import NAME

MOST_ROWS = 1000
FIELDS = ("id", "response_id", "experiment", "unit", "metric", "score", "thumb", "label", "at")
KINDS = ("score", "thumb", "label")
_METRIC = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_TEXT = 512  # characters of an id or a unit
_LARGEST = 1e12  # of a score
_AHEAD_SECONDS = 300.0  # how far a client's clock may be ahead
_THUMBS = {"up": 1.0, "down": 0.0, True: 1.0, False: 0.0}

Definitions = Callable[[str], Definition | None]
Known = Callable[[], Sequence[str]]


def read_outcomes(body: object, definition: Definitions, known: Known) -> list[Outcome]:
    """The outcomes of a request's body: an object, or {"outcomes": [objects]}.

    definition: the newest one of an experiment; known: the names of all, for who mistypes one. Raises WrongOutcome that names
    row and field; then nothing is to be written.
    """
    definition = cache(definition)
    if isinstance(body, dict) and body.keys() == {"outcomes"}:
        rows = body["outcomes"]
        if not isinstance(rows, list) or not 0 < len(rows) <= MOST_ROWS:
            raise WrongOutcome(f"outcomes is no list of 1 to {MOST_ROWS} outcomes", "outcomes")
        return [_Row(row, f"outcomes[{index}]", definition, known).outcome() for index, row in enumerate(rows)]
    return [_Row(body, "", definition, known).outcome()]


class WrongOutcome(UserInputError):
    """An outcome that is wrong. place: the row and field, such as `outcomes[3].score`; None for all of it."""

    def __init__(self, message: str, place: str | None) -> None:
        super().__init__(message)
        self.place = place


class _Row:
    """One outcome as it was sent."""

    def __init__(self, given: object, place: str, definition: Definitions, known: Known) -> None:
        self._place, self._definition, self._known = place, definition, known
        if not isinstance(given, dict):
            raise self._wrong("", "is not an object")
        unknown = [str(key) for key in given if key not in FIELDS]
        if unknown:
            raise self._wrong(unknown[0][:_MOST_TEXT], f"is no field of an outcome; those are {', '.join(FIELDS)}")
        self._given: Mapping[str, Any] = {key: value for key, value in given.items() if value is not None}

    def outcome(self) -> Outcome:
        metric, value, label = self._value()
        belongs = self._belongs()
        return Outcome(self._id(belongs, metric), self._at(), metric=metric, value=value, label=label, **belongs)

    def _value(self) -> tuple[str, float, str]:
        """Metric, value and label."""
        kinds = [kind for kind in KINDS if kind in self._given]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else "says nothing"
            raise self._wrong("", f"{found}; give one of {', '.join(KINDS)}")
        (kind,) = kinds
        metric = self._given.get("metric", kind)
        if not isinstance(metric, str) or _METRIC.fullmatch(metric) is None:
            raise self._wrong("metric", "is not a name: 1 to 64 letters, digits, '_', '-' and '.'")
        if metric in MEASURES:
            raise self._wrong("metric", f"{metric} is measured by the server; choose another name")
        given = self._given[kind]
        if kind == "label":
            if not isinstance(given, str) or not 0 < len(given) <= 64 or "=" in given or not given.isprintable():
                raise self._wrong("label", "is not a printable text of 1 to 64 characters without '='")
            return metric, 1.0, given
        if kind == "thumb":
            if not isinstance(given, str | bool) or given not in _THUMBS:
                raise self._wrong("thumb", "is not up, down, true or false")
            return metric, _THUMBS[given], ""
        if isinstance(given, bool) or not isinstance(given, int | float) or not abs(given) <= _LARGEST:
            raise self._wrong("score", f"is not a number between {-_LARGEST:g} and {_LARGEST:g}")
        return metric, float(given), ""

    def _belongs(self) -> dict[str, Any]:
        """What the outcome belongs to: an exposure, by its ticket, or a unit of an experiment."""
        if "response_id" in self._given:
            if "unit" in self._given:
                raise self._wrong("unit", "is known from the response_id; give one of the two")
            ticket = read_ticket(self._text("response_id"))
            if ticket is None:
                raise self._wrong("response_id", "is not the id of an answer that an experiment of this server gave")
            if self._given.get("experiment", ticket.experiment) != ticket.experiment:
                raise self._wrong("experiment", f"is not that of the response_id, {ticket.experiment}")
            return {
                "exposure": ticket.exposure,
                "experiment": ticket.experiment,
                "version": ticket.version,
                "arm": ticket.arm,
                "unit": ticket.unit or ticket.exposure,
                "counted": ticket.counted,
            }
        if "experiment" not in self._given or "unit" not in self._given:
            raise self._wrong("", "belongs to nothing; give response_id, or experiment and unit")
        experiment, unit = self._text("experiment"), self._text("unit")
        found = self._definition(experiment) if NAME.fullmatch(experiment) else None
        if found is None:
            known = self._known()
            hint = suggested(experiment, known, "experiments")
            raise self._wrong("experiment", f"there is no experiment {experiment[:64]!r}{hint}")
        seed = found.document["experiment"].get("seed") or experiment
        return {"experiment": experiment, "unit": unit_hash(seed, unit)}

    def _id(self, belongs: Mapping[str, Any], metric: str) -> str:
        """The idempotency key as it is stored: of one experiment, and of bounded length."""
        if "id" in self._given:
            return _key("given", belongs["experiment"], self._text("id"))
        if "exposure" not in belongs:
            raise self._wrong(
                "id", "is missing; without a response_id it tells a repeated request from a second outcome"
            )
        return _key("answer", belongs["exposure"], metric)

    def _at(self) -> float:
        given = self._given.get("at")
        if given is None:
            return time.time()
        if isinstance(given, str):
            try:
                moment = datetime.fromisoformat(given)
            except ValueError:
                moment = None
            if moment is None or moment.tzinfo is None:
                raise self._wrong("at", "is not a moment such as 2026-01-31T09:00:00Z, or seconds since 1970")
            given = moment.timestamp()
        if isinstance(given, bool) or not isinstance(given, int | float) or not given >= 0:
            raise self._wrong("at", "is not a moment such as 2026-01-31T09:00:00Z, or seconds since 1970")
        if given > time.time() + _AHEAD_SECONDS:
            raise self._wrong("at", "is in the future")
        return float(given)

    def _text(self, field: str) -> str:
        value = self._given[field]
        if not isinstance(value, str) or not 0 < len(value) <= _MOST_TEXT:
            raise self._wrong(field, f"is not a text of 1 to {_MOST_TEXT} characters")
        return value

    def _wrong(self, field: str, what: str) -> WrongOutcome:
        place = ".".join(part for part in (self._place, field) if part)
        return WrongOutcome(f"{place}: {what}" if place else f"the outcome {what}", place or None)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()
