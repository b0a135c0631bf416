# SPDX-License-Identifier: Apache-2.0
"""POST /v1/merge/outcomes, on an application with that route alone."""

import asyncio
import json
import threading

import pytest
from sqlalchemy import func, select

pytest.importorskip("fastapi")

from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.experiment_records import define, exposure, outcome
from vllm_merge.experiments import tables, tickets
from vllm_merge.experiments.commits import OutcomeCommits
from vllm_merge.experiments.report import report
from vllm_merge.experiments.store import Store, StoreError
from vllm_merge.experiments.tickets import Ticket
from vllm_merge.serving.routes import outcomes
from vllm_merge.serving.routes.route_errors import answer_errors

ROUTE = "/v1/merge/outcomes"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(tickets.KEY_VARIABLE, "a key for tests, long enough")
    tickets.signing_key.cache_clear()
    yield
    tickets.signing_key.cache_clear()


@pytest.fixture
def store(tmp_path):
    opened = Store.open(str(tmp_path / "experiments.sqlite"))
    define(opened)
    yield opened
    opened.close()


def serving(store: Store | None) -> TestClient:
    app = FastAPI()
    answer_errors(app)
    app.include_router(outcomes.router)
    app.state.vllm_merge_outcomes = outcomes.OutcomeDesk(lambda: store)
    return TestClient(app)


def response_id(number: int, arm: str = "b") -> str:
    return f"chatcmpl-{Ticket(f'{number:032x}', 'ab', 1, arm, f'{number:032x}').sign()}"


def count(store: Store) -> int:
    with store.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(tables.outcomes)).scalar_one())


def test_an_outcome_is_on_disk_when_it_is_answered(store, tmp_path):
    with serving(store) as client:
        first = client.post(ROUTE, json={"response_id": response_id(1), "thumb": "up"})
        assert (first.status_code, first.json()) == (200, {"object": "merge.outcomes", "recorded": 1, "known": 0})
        again = client.post(ROUTE, json={"response_id": response_id(1), "thumb": "down"})
        assert again.json() == {"object": "merge.outcomes", "recorded": 0, "known": 1}
    other = Store.open(str(tmp_path / "experiments.sqlite"), create=False)
    with other.reading() as connection:
        (row,) = connection.execute(select(tables.outcomes)).all()
    assert (row.metric, row.value, row.arm, row.unit) == ("thumb", 1.0, "b", f"{1:032x}")
    other.close()


def test_a_batch_is_written_whole_or_not_at_all(store):
    rows = [{"response_id": response_id(i), "score": i} for i in range(50)]
    with serving(store) as client:
        wrong = client.post(ROUTE, json={"outcomes": [*rows, {"response_id": response_id(50), "score": "high"}]})
        assert wrong.status_code == 422
        assert wrong.json()["error"]["param"] == "outcomes[50].score"
        assert wrong.json()["error"]["message"].startswith("outcomes[50].score: is not a number")
        assert count(store) == 0
        assert client.post(ROUTE, json={"outcomes": rows}).json()["recorded"] == 50
    assert count(store) == 50


def test_a_name_that_no_experiment_has_is_told_with_those_that_there_are(store):
    define(store, name="other")
    with serving(store) as client:
        found = client.post(ROUTE, json={"outcomes": [{"experiment": "othre", "unit": "u", "id": "x", "score": 1}]})
    assert (found.status_code, found.json()["error"]["message"]) == (
        422,
        "outcomes[0].experiment: there is no experiment 'othre', did you mean 'other'? (experiments: ab, other)",
    )


def test_what_is_posted_is_reported(store):
    store.add_exposures([exposure(i, "ab"[i % 2]) for i in range(120)])
    rows = [{"response_id": response_id(i, "ab"[i % 2]), "thumb": i % 2 == 0} for i in range(120)]
    with serving(store) as client:
        assert client.post(ROUTE, json={"outcomes": rows}).json()["recorded"] == 120
    (thumb,) = (metric for metric in report(store, "ab")["metrics"] if metric["metric"] == "thumb")
    assert [(value["arm"], value["units"], value["value"]) for value in thumb["values"]] == [
        ("a", 60, 1.0),
        ("b", 60, 0.0),
    ]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3", b'{"score": NaN}'])
def test_what_is_no_outcome_is_a_422(store, body):
    with serving(store) as client:
        assert client.post(ROUTE, content=body).status_code == 422


def test_a_body_is_bounded(store):
    with serving(store) as client:
        found = client.post(ROUTE, content=b" " * (outcomes.MOST_BYTES + 1))
        assert found.status_code == 413
        chunks = (b" " * 65_536 for _ in range(40))  # without a length said beforehand
        assert client.post(ROUTE, content=chunks).status_code == 413


def test_a_rate_is_bounded(store, monkeypatch):
    monkeypatch.setattr(outcomes, "BURST", 3.0)
    monkeypatch.setattr(outcomes, "RATE", 0.001)
    with serving(store) as client:
        rows = [{"response_id": response_id(i), "score": 1} for i in range(3)]
        assert client.post(ROUTE, json={"outcomes": rows}).status_code == 200
        found = client.post(ROUTE, json=rows[0])
        assert (found.status_code, int(found.headers["retry-after"]) > 0) == (429, True)


def test_without_experiments_there_is_nothing_to_belong_to():
    with serving(None) as client:
        found = client.post(ROUTE, json={"response_id": response_id(1), "score": 1})
        assert found.status_code == 404
        assert "no experiments" in found.json()["error"]["message"]


def test_a_store_that_fails_is_a_503(store, monkeypatch):
    def fail(batch):
        raise StoreError("the disk is full")

    monkeypatch.setattr(store, "add_outcomes", fail)
    with serving(store) as client:
        found = client.post(ROUTE, json={"response_id": response_id(1), "score": 1})
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json()["error"]["message"] == "the disk is full"


def test_callers_that_come_together_share_a_commit_and_each_hears_of_its_own():
    class Slow:
        def __init__(self):
            self.batches, self.first = [], threading.Event()

        def add_outcomes(self, batch):
            self.batches.append(len(batch))
            if len(self.batches) == 1:
                self.first.wait(60)
            if any(one.id == "bad" for one in batch):
                raise StoreError("gone")
            return [one.value > 0 for one in batch]

    async def together():
        slow = Slow()
        commits = OutcomeCommits(slow)
        first = asyncio.create_task(commits.add([outcome(0)]))
        while not slow.batches:
            await asyncio.sleep(0.01)
        others = [asyncio.create_task(commits.add([outcome(i, i % 2), outcome(i + 100, 1)])) for i in range(1, 9)]
        await asyncio.sleep(0)
        slow.first.set()
        assert await first == [True]
        assert await asyncio.gather(*others) == [[bool(i % 2), True] for i in range(1, 9)]
        assert slow.batches == [1, 16]
        with pytest.raises(StoreError):
            await commits.add([outcome(1, id="bad")])
        assert await commits.add([outcome(2)]) == [True]  # the next one is not held up

    asyncio.run(together())


def test_the_route_says_what_it_takes():
    app = FastAPI()
    app.include_router(outcomes.router)
    described = app.openapi()["paths"][ROUTE]["post"]
    single, many = described["requestBody"]["content"]["application/json"]["schema"]["anyOf"]
    assert {"response_id", "score", "thumb", "label", "metric"} <= single["properties"].keys()
    assert many["properties"]["outcomes"]["maxItems"] == 1000
    assert {"200", "413", "422", "429", "503"} <= described["responses"].keys()
    json.dumps(described)
