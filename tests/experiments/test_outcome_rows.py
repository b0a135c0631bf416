# SPDX-License-Identifier: Apache-2.0
"""Outcomes as clients write them: what is good is joined, what is wrong is named by row and field."""

import time

import pytest

from vllm_merge.experiments import tickets
from vllm_merge.experiments.hashing import unit_hash
from vllm_merge.experiments.outcome_rows import MOST_ROWS, WrongOutcome, read_outcomes
from vllm_merge.experiments.records import Definition
from vllm_merge.experiments.tickets import Ticket

TICKET = Ticket("0123456789abcdef" * 2, "ab", 3, "b", "f" * 32)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(tickets.KEY_VARIABLE, "a key for tests, long enough")
    tickets.signing_key.cache_clear()
    yield
    tickets.signing_key.cache_clear()


def definition(name: str) -> Definition | None:
    seeds = {"ab": None, "seeded": "a seed"}
    return Definition(name, 1, 0.0, {"experiment": {"seed": seeds[name]}}) if name in seeds else None


def known() -> list[str]:
    return ["ab", "seeded"]


def one(**fields):
    given = {"response_id": f"chatcmpl-{TICKET.sign()}", **fields}
    return read_outcomes({key: value for key, value in given.items() if value is not None}, definition, known)[0]


@pytest.mark.parametrize(
    ("given", "metric", "value", "label"),
    [
        ({"score": 3}, "score", 3.0, ""),
        ({"score": -0.5, "metric": "nps"}, "nps", -0.5, ""),
        ({"thumb": "up"}, "thumb", 1.0, ""),
        ({"thumb": False}, "thumb", 0.0, ""),
        ({"label": "solved", "metric": "ticket"}, "ticket", 1.0, "solved"),
    ],
)
def test_what_an_outcome_says(given, metric, value, label):
    found = one(**given)
    assert (found.metric, found.value, found.label) == (metric, value, label)
    assert (found.exposure, found.experiment, found.version, found.arm) == (TICKET.exposure, "ab", 3, "b")
    assert (found.unit, found.counted) == (TICKET.unit, True)
    assert abs(found.at - time.time()) < 60


def test_a_request_that_is_its_own_unit_and_a_forced_arm():
    found = one(response_id=Ticket("a" * 32, "ab", 1, "b", counted=False).sign(), score=1)
    assert (found.unit, found.counted) == ("a" * 32, False)


def test_an_answers_metric_has_one_outcome_unless_ids_say_otherwise():
    assert one(score=1).id == one(score=0).id
    assert one(score=1).id != one(score=1, metric="other").id
    assert one(score=1, id="x").id != one(score=1, id="y").id
    assert one(score=1, id="x").id == one(score=1, id="x", at=5).id


@pytest.mark.parametrize(("experiment", "seed"), [("ab", "ab"), ("seeded", "a seed")])
def test_a_unit_is_hashed_as_its_exposures_are(experiment, seed):
    found = one(response_id=None, experiment=experiment, unit="user 7", id="x", score=1)
    assert found.unit == unit_hash(seed, "user 7")
    assert (found.exposure, found.version, found.arm) == ("", 0, "")


@pytest.mark.parametrize("at", [1_700_000_000, 1_700_000_000.0, "2023-11-14T22:13:20Z", "2023-11-14T23:13:20+01:00"])
def test_a_moment_may_be_given(at):
    assert one(score=1, at=at).at == 1_700_000_000.0


WRONG = [
    ({"score": 1, "response_id": "chatcmpl-123"}, "response_id", "is not the id of an answer"),
    ({"score": 1, "response_id": f"{TICKET.sign()[:-1]}~"}, "response_id", "is not the id"),
    ({"score": 1, "response_id": 7}, "response_id", "is not a text"),
    ({"score": "3"}, "score", "is not a number"),
    ({"score": True}, "score", "is not a number"),
    ({"score": float("nan")}, "score", "is not a number"),
    ({"score": 10**400}, "score", "is not a number"),
    ({"score": -1e13}, "score", "is not a number"),
    ({"thumb": "sideways"}, "thumb", "is not up, down, true or false"),
    ({"thumb": 1}, "thumb", "is not up"),
    ({"thumb": ["up"]}, "thumb", "is not up"),
    ({"label": ""}, "label", "is not a printable text"),
    ({"label": "a=b"}, "label", "is not a printable text"),
    ({"label": "a\0b"}, "label", "is not a printable text"),
    ({"label": "\ud800"}, "label", "is not a printable text"),
    ({"label": "x" * 65}, "label", "is not a printable text"),
    ({}, None, "says nothing; give one of score, thumb, label"),
    ({"score": 1, "thumb": "up"}, None, "has score and thumb"),
    ({"score": 1, "metric": "errors"}, "metric", "is measured by the server"),
    ({"score": 1, "metric": "a metric"}, "metric", "is not a name"),
    ({"score": 1, "unit": "u"}, "unit", "give one of the two"),
    ({"score": 1, "experiment": "other"}, "experiment", "is not that of the response_id, ab"),
    ({"score": 1, "response_id": None}, None, "belongs to nothing"),
    (
        {"score": 1, "response_id": None, "experiment": "no", "unit": "u", "id": "x"},
        "experiment",
        r"experiment: there is no experiment 'no' \(experiments: ab, seeded\)$",
    ),
    (
        {"score": 1, "response_id": None, "experiment": "sedeed", "unit": "u", "id": "x"},
        "experiment",
        r"experiment: there is no experiment 'sedeed', did you mean 'seeded'\? \(experiments: ab, seeded\)$",
    ),
    (
        {"score": 1, "response_id": None, "experiment": "a\0", "unit": "u", "id": "x"},
        "experiment",
        "there is no experiment",
    ),
    ({"score": 1, "response_id": None, "experiment": "ab", "unit": "u"}, "id", "is missing"),
    ({"score": 1, "response_id": None, "experiment": "ab", "unit": 7, "id": "x"}, "unit", "is not a text"),
    ({"score": 1, "id": "x" * 513}, "id", "is not a text of 1 to 512"),
    ({"score": 1, "at": "yesterday"}, "at", "is not a moment"),
    ({"score": 1, "at": "2026-01-01T00:00:00"}, "at", "is not a moment"),
    ({"score": 1, "at": -1}, "at", "is not a moment"),
    ({"score": 1, "at": 1e11}, "at", "is in the future"),
    ({"score": 1, "colour": "red"}, "colour", "is no field of an outcome"),
]


@pytest.mark.parametrize(("given", "field", "what"), WRONG)
def test_what_is_wrong_is_named(given, field, what):
    with pytest.raises(WrongOutcome, match=what) as alone:
        one(**given)
    assert alone.value.place == field
    good = {"response_id": TICKET.sign(), "score": 1}
    wrong = {k: v for k, v in {"response_id": TICKET.sign(), **given}.items() if v is not None}
    with pytest.raises(WrongOutcome) as among:
        read_outcomes({"outcomes": [good, good, wrong]}, definition, known)
    assert among.value.place == ("outcomes[2]" if field is None else f"outcomes[2].{field}")
    assert str(among.value).startswith(f"{among.value.place}: ")


@pytest.mark.parametrize("body", [None, 3, [], "text", {"outcomes": []}, {"outcomes": 3}, {"outcomes": [None]}, [{}]])
def test_other_bodies_are_refused(body):
    with pytest.raises(WrongOutcome):
        read_outcomes(body, definition, known)


def test_a_batch_is_bounded():
    row = {"response_id": TICKET.sign(), "score": 1}
    assert len(read_outcomes({"outcomes": [row] * MOST_ROWS}, definition, known)) == MOST_ROWS
    with pytest.raises(WrongOutcome, match=f"1 to {MOST_ROWS}"):
        read_outcomes({"outcomes": [row] * (MOST_ROWS + 1)}, definition, known)
