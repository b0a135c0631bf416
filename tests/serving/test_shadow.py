# SPDX-License-Identifier: Apache-2.0
"""Comparisons on a played server: who is compared with whom, what is kept of it, and that clients notice nothing."""

import asyncio
import json
import math
import sqlite3

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tests.serving import played_server
from tests.serving.judging import judging
from tests.serving.played_server import PlayedEngine, patched, played, recipe_file
from vllm_merge.experiments.divergence import truncated_kl
from vllm_merge.serving.experiments import shadow, shadow_requests
from vllm_merge.serving.experiments.shadow import drawn, positions
from vllm_merge.serving.requests import answers
from vllm_merge.serving.telemetry.metrics_requests import request_metrics

PROMPT = [11, 12, 13]
SECRET = "the password is swordfish"
HELD = "wait"
STEADY, FIRST = [7, 8], 9  # tokens that every arm begins with; the third one is the arm's own
AB = {"arms": {"m0": 1, "m1": 1}, "unit": "user", "shadow": {"share": 1, "at_once": 64}}


class Token(str):
    """What the played engine gives for one step, in the shape of vLLM's output."""

    def __new__(cls, text: str, step: int):
        made = super().__new__(cls, text)
        made.prompt_token_ids = PROMPT
        made.outputs = [Piece([*STEADY, own_token(text)][step], text)]
        return made


class Piece:
    def __init__(self, token: int, text: str) -> None:
        self.token_ids, self.finish_reason, self.text = [token], "length", text


def own_token(text: str) -> int:
    return 100 + int(text, 16) % 1000


def distribution(text: str, prompt: list[int]) -> dict[int, float]:
    """Of the token that follows a prompt, by the weights' hash."""
    p = 0.2 + (int(text, 16) % 97) / 200 + len(prompt) / 100
    return {7: p, 8: 0.9 - p, own_token(text): 0.05}


def logs(text: str, prompt: list[int]) -> dict[int, float]:
    return {token: math.log(p) for token, p in distribution(text, prompt).items()}


async def generate(self, prompt, *, lora_request=None):
    step = 0
    async for text in _generate(self, prompt, lora_request=lora_request):
        yield Token(text, step)
        step += 1


_generate = PlayedEngine.generate


class Application:
    """/v1/completions with streams and logprobs. gate: comparisons wait for it; held: prompts HELD do; broken: what comparisons raise."""

    def __init__(self) -> None:
        self.seen: list[tuple[dict, dict]] = []  # headers and body of every request that was no client's
        self.gate, self.held = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.held.set()
        self.broken: Exception | None = None

    def __call__(self, engine, models, endpoints) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: Request):
            body = await request.json()
            if request.headers.get("x-request-id", "").startswith("shadow-"):
                self.seen.append((dict(request.headers), body))
                await self.gate.wait()
                if self.broken is not None:
                    raise self.broken
            elif body["prompt"] == HELD:
                await self.held.wait()
            lora = models.lora_requests.get(body["model"])
            if lora is None:
                return JSONResponse({"error": {"message": f"no {body['model']}", "type": "NotFoundError"}}, 404)
            if body.get("temperature") == -1:
                return JSONResponse({"error": {"message": "wrong", "type": "BadRequestError"}}, 400)
            if "logprobs" in body:
                outputs = [[t async for t in engine.generate(p, lora_request=lora)] for p in body["prompt"]]
                rows = [logs(out[0], prompt) for out, prompt in zip(outputs, body["prompt"], strict=True)]
                tops = [{f"token_id:{token}": value for token, value in row.items()} for row in rows]
                choices = [{"index": i, "logprobs": {"top_logprobs": [top]}} for i, top in enumerate(tops)]
                return JSONResponse({"choices": choices[::-1]})
            if body.get("stream"):

                async def stream():
                    async for token in engine.generate(body["prompt"], lora_request=lora):
                        yield f'data: {{"choices": [{{"text": "{token}"}}]}}\n\n'

                return StreamingResponse(stream(), media_type="text/event-stream")
            tokens = [token async for token in engine.generate(body["prompt"], lora_request=lora)]
            return JSONResponse({"model": lora.lora_name, "tokens": tokens})

        endpoints.attach_router(app)
        return app


@pytest.fixture
def run(tmp_path):
    """run(scenario, experiment) plays scenario(server, app) with four slots."""

    def run(scenario, experiment, **settings):
        app = None

        async def begun(server):
            return await scenario(server, app)

        def application(*given):
            nonlocal app
            app = Application()
            return app(*given)

        config = recipe_file(tmp_path, experiments={"ab": experiment})
        changes = {"SLOTS": 4, "_application": application}
        with patched(played_server, **changes), patched(PlayedEngine, generate=generate):
            return played(begun, config, STORE=tmp_path / "store.sqlite", **settings)

    return run


def shadows(server):
    return server.published.experiments.shadows


def table(server, name: str) -> list[dict]:
    with sqlite3.connect(server.published.experiments.store.engine.url.database) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {name} ORDER BY at")]


async def pairs(server, count: int) -> list[dict]:
    """The store's pairs, once so many are there and nothing is compared any more."""
    await server.until(lambda: not shadows(server)._tasks)
    await server.until(lambda: not server.published.experiments.writer.waiting)
    await server.until(lambda: len(table(server, "pairs")) >= count)
    found = table(server, "pairs")
    assert len(found) == count
    return found


async def both_arms(server, **more) -> dict[str, dict]:
    """{arm: its answer} of the first users that get them."""
    found = {}
    for number in range(100):
        reply = await server.ask("ab", user=f"user-{number}", **more)
        assert reply.status_code == 200
        found.setdefault(reply.headers["x-vllm-merge-arm"], []).append(reply)
        if len(found) == 2:
            return found
    raise AssertionError(f"one arm alone: {found.keys()}")


def test_the_other_arm_answers_as_well_and_both_are_compared(run):
    async def scenario(server, app):
        told = []
        end = answers.subscribe(told.append)
        replies = await both_arms(server)
        end()
        count = sum(map(len, replies.values()))
        found = await pairs(server, count)
        assert {(row["arm"], row["shadow"]) for row in found} == {("m0", "m1"), ("m1", "m0")}
        own = {arm: said[0].json()["tokens"][0] for arm, said in replies.items()}
        for row in found:
            assert (row["outcome"], row["version"], row["tokens"], row["shadow_tokens"]) == ("ok", 1, 3, 3)
            assert (row["equal"], row["agreement"]) == (0, pytest.approx(2 / 3))
            prefixes = [[*PROMPT, *STEADY][: 3 + place] for place in range(3)]
            sides = [[logs(own[row[arm]], prefix) for prefix in prefixes] for arm in ("arm", "shadow")]
            each = [truncated_kl(p, q) for p, q in zip(*sides, strict=True)]
            assert row["positions"] == 3
            assert row["kl"] == pytest.approx(sum(one.kl for one in each) / 3)
            assert row["missing"] == pytest.approx(sum(one.missing for one in each) / 3)
            assert row["seconds"] > 0 < row["shadow_seconds"]
        exposures = table(server, "exposures")
        assert {row["exposure"] for row in found} == {row["id"] for row in exposures}
        assert len(exposures) == len(told) == count, "a comparison is no exposure and no client's request"
        assert {row["unit"] for row in found} == {row["unit"] for row in exposures}
        report = (await server.apis[0].client.get("/v1/merge/experiments/ab/report")).json()
        assert report["paired"][0]["pairs"] == count
        assert sum(arm["requests"] for arm in report["arms"]) == count

    run(scenario, AB)


def test_the_client_s_headers_and_own_id_are_not_sent_again(run):
    async def scenario(server, app):
        headers = {"authorization": f"Bearer {SECRET}", "cookie": SECRET}
        body = {"model": "ab", "prompt": SECRET, "seed": 3, "request_id": "mine", "cache_salt": "salt"}
        await server.apis[0].client.post("/v1/completions", json=body, headers=headers)
        await pairs(server, 1)
        assert len(app.seen) == 3, "an answer, and the distributions of two arms"
        sent = [value for headers, _ in app.seen for value in headers.values()]
        assert not [value for value in sent if SECRET in value]
        again, own, other = (body for _, body in app.seen)
        assert (again["prompt"], again["seed"], "request_id" in again) == (SECRET, 3, False)
        assert again["model"] == other["model"] != own["model"]
        assert own["prompt"] == [PROMPT, [*PROMPT, 7], [*PROMPT, 7, 8]]
        assert (own["max_tokens"], own["cache_salt"]) == (1, "salt")

    run(scenario, AB)


def test_a_stream_is_compared_with_a_stream(run):
    async def scenario(server, app):
        reply = await server.ask("ab", stream=True)
        assert reply.text.count("data: ") == 3
        (row,) = await pairs(server, 1)
        assert (row["streaming"], row["agreement"]) == (1, pytest.approx(2 / 3))
        assert row["first_token"] > 0 < row["shadow_first_token"]

    run(scenario, AB)


def test_two_arms_that_serve_the_same_agree_in_everything(run):
    async def scenario(server, app):
        await server.ask("ab")
        (row,) = await pairs(server, 1)
        assert (row["equal"], row["agreement"], row["kl"]) == (1, 1, 0)

    run(scenario, {**AB, "arms": {"a": {"serve": "m0", "weight": 1}, "b": {"serve": "m0", "weight": 1}}})


def test_an_arm_without_traffic_can_be_compared(run):
    async def scenario(server, app):
        for _ in range(5):
            assert (await server.ask("ab")).headers["x-vllm-merge-arm"] == "m0"
        found = await pairs(server, 5)
        assert {(row["arm"], row["shadow"], row["kl"], row["equal"]) for row in found} == {("m0", "m2", None, 0)}

    only = {"share": 1, "at_once": 64, "arms": ["m2"], "compare": ["answers"]}
    run(scenario, {**AB, "arms": {"m0": 1, "m1": 0, "m2": 0}, "shadow": only})


def test_comparisons_that_hang_hold_nobody_up_and_further_ones_are_dropped_and_counted(run):
    def counted(outcome):
        counter = request_metrics()._counters["vllm_merge_shadows_total"]
        return sum(counter.labels("ab", arm, outcome)._value.get() for arm in ("m0", "m1"))

    async def scenario(server, app):
        before = counted("too_many")
        app.gate.clear()
        for number in range(10):
            reply = await server.ask("ab", user=f"user-{number}", stream=number % 2 == 0)
            assert reply.status_code == 200, "answered while every comparison hangs"
        assert len(shadows(server)._tasks) == 2
        await server.until(lambda: len(app.seen) == 2)
        await server.until(lambda: len(table(server, "pairs")) == 8)
        assert {row["outcome"] for row in table(server, "pairs")} == {"too_many"}
        assert counted("too_many") == before + 8
        report = (await server.apis[0].client.get("/v1/merge/experiments/ab/report")).json()
        assert report["paired"][0]["dropped"] == {"too_many": 8}
        app.gate.set()
        found = await pairs(server, 10)
        assert sum(row["outcome"] == "ok" for row in found) == 2
        await server.ask("ab")
        assert (await pairs(server, 11))[-1]["outcome"] == "ok", "there is room again"

    run(scenario, {**AB, "shadow": {"share": 1}})


def test_a_server_ends_while_a_comparison_hangs(run):
    async def scenario(server, app):
        app.gate.clear()
        await server.ask("ab")
        await server.until(lambda: len(app.seen) == 1)
        return shadows(server)

    assert run(scenario, AB)._tasks == set()


def test_a_comparison_ends_when_it_takes_too_long(run):
    async def scenario(server, app):
        app.gate.clear()
        await server.ask("ab")
        (row,) = await pairs(server, 1)
        assert (row["outcome"], row["kl"], row["agreement"]) == ("timeout", None, None)
        assert shadows(server)._at_once["ab"] == 0, "there is room for another"

    with patched(shadow, MOST_SECONDS=0.05):
        run(scenario, AB)


def test_nothing_is_compared_while_clients_keep_the_server_busy(run):
    async def scenario(server, app):
        app.held.clear()
        waiting = asyncio.create_task(server.ask("m5", prompt=HELD))
        await server.until(lambda: shadows(server).running == 1)
        assert (await server.ask("ab")).status_code == 200
        (row,) = await pairs(server, 1)
        assert (row["outcome"], app.seen) == ("busy", [])
        app.held.set()
        assert (await waiting).status_code == 200
        assert shadows(server).running == 0
        await server.ask("ab")
        assert (await pairs(server, 2))[-1]["outcome"] == "ok"

    run(scenario, {**AB, "shadow": {"share": 1, "busy_at": 1}})


def test_an_arm_that_is_not_in_memory_is_not_waited_for(run):
    async def scenario(server, app):
        names = server.published.state.names
        await server.published.experiments.arms.release({}, names)
        label = server.label("m1")
        digest = names.names["m1"].digest
        await server.until(lambda: not server.front.artifacts[digest].leased)
        assert (await server.admin("POST", f"artifacts/{digest}/evict")).json()["evicted"] is True
        await server.ask("ab")
        (row,) = await pairs(server, 1)
        assert (row["outcome"], row["shadow"], app.seen) == ("unavailable", "m1", []), label
        await server.until(
            lambda: server.front.artifacts[digest].warming is None or server.front.artifacts[digest].warming.done()
        )

    run(scenario, {**AB, "arms": {"m0": 1, "m1": 0}})


def test_a_comparison_that_fails_is_counted_and_its_request_is_in_no_log(run, caplog):
    async def scenario(server, app):
        app.broken = RuntimeError(f"cannot answer {SECRET}")
        assert (await server.ask("ab", user=SECRET, suffix="", stop=SECRET)).status_code == 200
        (row,) = await pairs(server, 1)
        assert row["outcome"] == "failed"
        app.broken = None
        await server.ask("ab")
        assert (await pairs(server, 2))[-1]["outcome"] == "ok"
        assert not [row for name in ("pairs", "exposures") for row in table(server, name) if SECRET in json.dumps(row)]

    with caplog.at_level("DEBUG"):
        run(scenario, AB)
    assert "cannot be compared: RuntimeError" in caplog.text
    assert "swordfish" not in caplog.text.replace("\\", "")


@pytest.mark.parametrize(
    ("shadow", "more"),
    [
        (None, {}),
        ({"share": 0}, {}),
        ({"share": 1, "arms": ["m0"]}, {}),  # who answers already
        ({"share": 1}, {"n": 2}),
        ({"share": 1}, {"prompt": ["x", "y"]}),
        ({"share": 1}, {"echo": True}),
        ({"share": 1}, {"temperature": -1}),
    ],
)
def test_who_is_not_drawn_not_comparable_or_not_answered_is_not_compared(run, shadow, more):
    async def scenario(server, app):
        for _ in range(3):
            await server.ask("ab", **more)
        assert shadows(server)._tasks == set()
        await server.until(lambda: not server.published.experiments.writer.waiting)
        assert (app.seen, table(server, "pairs")) == ([], [])

    run(scenario, {**AB, "arms": {"m0": 1, "m1": 0}, "shadow": shadow} if shadow else {"arms": {"m0": 1, "m1": 0}})


class Body:
    """As much of a request as is looked at."""

    def __init__(self, document, size=100):
        self.document, self.size = document, size


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("path", "document", "fits"),
    [
        ("/v1/completions", {"prompt": [1, 2]}, True),
        ("/v1/completions", {"prompt": [[1], [2]]}, False),
        ("/v1/completions", {"prompt": None}, False),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "n": 1}, True),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, True),
        (CHAT, {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, True),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, False),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, False),
        (CHAT, {"messages": ["x"]}, False),
        (CHAT, {"messages": [{"content": "x"}], "kv_transfer_params": {"a": 1}}, False),
        (CHAT, {"messages": [{"content": "x"}], "n": [1]}, False),
        ("/v1/embeddings", {"input": "x"}, False),
    ],
)
def test_one_prompt_of_text_and_one_answer_can_be_compared(path, document, fits):
    assert shadow_requests.comparable(path, Body(document)) == (document if fits else None)
    assert shadow_requests.comparable(path, Body(document, shadow_requests.MOST_BYTES + 1)) is None


def test_the_draw_is_even_and_always_the_same():
    ids = [f"{number:032x}" for number in range(20_000)]
    places = [drawn(one) for one in ids]
    assert places == [drawn(one) for one in ids]
    assert [sum(place < share for place in places) / len(ids) for share in (0.05, 0.5)] == pytest.approx(
        [0.05, 0.5], abs=0.01
    )
    assert positions("x", 3) == [0, 1, 2]
    assert positions("x", 500) == positions("x", 500) != positions("y", 500)
    assert len(set(positions("x", 500))) == 8


def test_a_judge_says_which_answer_it_likes(run):
    """It likes what m1 says, wherever it is shown."""

    async def scenario(server, app):
        liked = (await server.ask("m1")).json()["tokens"][0]
        judge.likes = liked
        count = sum(map(len, (await both_arms(server, prompt=SECRET)).values()))
        found = await pairs(server, count)
        assert {(row["arm"], row["preferred"]) for row in found} == {("m0", 1.0), ("m1", 0.0)}
        report = (await server.apis[0].client.get("/v1/merge/experiments/ab/report")).json()
        values = {value["metric"]: value["value"] for value in report["paired"][0]["values"]}
        assert values["preferred"] == 1, "m1 over m0, whoever answered the client"
        assert all(SECRET in asked and liked in asked for asked in judge.asked)
        judge.status = 500
        await server.ask("ab")
        last = (await pairs(server, count + 1))[-1]
        assert (last["outcome"], last["preferred"], last["equal"]) == ("ok", None, 0), "the rest stands"

    wanted = {"share": 1, "at_once": 64, "compare": ["answers", "judge"]}
    with judging() as judge:
        run(scenario, {**AB, "shadow": wanted}, JUDGE=judge.url, JUDGE_MODEL="wise")


def test_a_judge_that_is_wanted_but_not_there_is_said(run, caplog):
    async def scenario(server, app):
        await server.ask("ab")
        (row,) = await pairs(server, 1)
        assert (row["outcome"], row["preferred"]) == ("ok", None)

    run(scenario, {**AB, "shadow": {"share": 1, "compare": ["answers", "judge"]}})
    assert "experiment ab: nothing is judged: VLLM_MERGE_JUDGE names no judge" in caplog.text
