# SPDX-License-Identifier: Apache-2.0
"""Experiments on a played server: two API processes with everything real but vLLM, and a store."""

import asyncio
import time

import pytest

from tests.serving import played_server
from tests.serving.played_server import ADMIN, BASE, TOKEN, patched, played, recipe_file
from vllm_merge.experiments.assignment import Assigner
from vllm_merge.experiments.records import Decision, Exposure
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tickets import read_ticket
from vllm_merge.serving.experiments import experiment_watch

AB = {
    "arms": {"m0": 1, "m1": 1},
    "alias": "assistant",
    "unit": "user",
    "guardrails": [{"metric": "errors", "max": 0.2}],
}
USERS = [f"user-{i}" for i in range(24)]


@pytest.fixture
def run(tmp_path):
    """run(scenario, {experiments}) plays a server with four slots; the store stays from one run to the next."""

    def run(scenario, experiments, *, apis=2, slots=4, **settings):
        config = recipe_file(tmp_path, experiments=experiments)
        with patched(played_server, SLOTS=slots), patched(experiment_watch, POLL_SECONDS=0.02, GUARD_SECONDS=0.02):
            return played(scenario, config, apis=apis, STORE=tmp_path / "store.sqlite", **settings)

    return run


def shown(response) -> dict[str, str]:
    """The answer's headers of ours, without the ticket."""
    start = "x-vllm-merge-"
    found = {key.removeprefix(start): value for key, value in response.headers.items() if key.startswith(start)}
    return {key: value for key, value in found.items() if key != "exposure"}


async def exposures(server, count: int) -> list[Exposure]:
    """What is in the store, once so many are."""
    import sqlite3

    writers = [api.app.state.vllm_merge_experiments.writer for api in server.apis]
    await server.until(lambda: sum(writer.written for writer in writers if writer) >= count)
    with sqlite3.connect(writers[0]._store.engine.url.database) as connection:
        connection.row_factory = sqlite3.Row
        rows = [dict(row) for row in connection.execute("SELECT * FROM exposures ORDER BY at")]
    return [Exposure(**{**row, "streaming": bool(row["streaming"]), "refused": bool(row["refused"])}) for row in rows]


def test_a_unit_keeps_its_arm_at_every_process_and_the_answer_says_so(run):
    async def scenario(server):
        arms = {}
        for user in USERS:
            replies = [await api.ask(name, user=user) for api in server.apis for name in ("assistant", "ab")]
            said = [shown(reply) for reply in replies]
            assert {row["arm"] for row in said} == {said[0]["arm"]}, "at every process, by both names"
            arms[user] = said[0]["arm"]
            assert said[0]["artifact"].startswith(said[0]["arm"] + "@")
            assert [reply.json()["model"] for reply in replies] == [said[0]["artifact"]] * 4
            assert (said[0]["experiment"], said[0]["reason"], said[0]["name"]) == ("ab", "SPLIT", "assistant")
            ticket = read_ticket(replies[0].headers["x-vllm-merge-exposure"])
            assert (ticket.experiment, ticket.version, ticket.arm, ticket.counted) == ("ab", 1, arms[user], True)
        assigner = Assigner(server.published.state.trials.running["ab"])
        assert arms == {user: assigner.assign(user, time.time()).variant for user in USERS}
        assert set(arms.values()) == {"m0", "m1"}
        kept = await exposures(server, 4 * len(USERS))
        assert len({row.id for row in kept}) == 4 * len(USERS)
        assert {row.unit for row in kept}.isdisjoint(USERS)
        assert {(row.status, row.error, row.unit_kind, row.version) for row in kept} == {(200, "", "user", 1)}

    run(scenario, {"ab": AB})


def test_all_arms_are_in_memory_and_held_before_the_first_request(run):
    async def scenario(server):
        held = {a.name.partition("@")[0]: a for a in server.front.artifacts.values() if a.leased}
        assert held.keys() == {"m0", "m1"}
        assert all(artifact.users == 1 for artifact in held.values())
        digests = {artifact.plan.digest for artifact in held.values()}
        for digest in digests:
            assert (await server.admin("POST", f"artifacts/{digest}/evict")).json()["evicted"] is False
        for name in ("m2", "m3", "m4", "m5", "a0", "a1", "a2", "a3"):
            assert (await server.ask(name)).status_code == 200
        assert all(server.service.store.peek(digest) is not None for digest in digests)

    run(scenario, {"ab": AB}, apis=1)


@pytest.mark.parametrize(("slots", "fits"), [(3, True), (2, False)])
def test_arms_leave_a_slot_to_the_others_or_the_server_does_not_start(run, capsys, slots, fits):
    async def scenario(server):
        assert (await server.ask("ab", user="u")).status_code == 200

    if fits:
        run(scenario, {"ab": AB}, slots=slots)
        return
    with pytest.raises(Exception, match="2 for ab = 2 slots, but --max-loras 2 leaves 1 beside one for all others"):
        run(scenario, {"ab": AB}, slots=slots)
    assert "start vLLM with --max-loras 3" in capsys.readouterr().err


def test_a_reload_with_too_many_arms_changes_nothing_and_says_the_sum(run, tmp_path):
    async def scenario(server):
        third = {"arms": {"m2": 1, "m3": 1, "m0": 1}}
        recipe_file(tmp_path, experiments={"ab": AB, "more": third})
        await server.until(lambda: server.published.state.error is not None)
        state = server.published.state
        assert "2 for ab + 2 for more = 4 slots, but --max-loras 4 leaves 3" in state.error
        assert (state.trials.running.keys(), state.generation) == ({"ab"}, 1)
        assert (await server.ask("ab", user="u")).status_code == 200
        recipe_file(tmp_path, experiments={"ab": AB, "more": {"arms": {"m2": 1, "m0": 1}}})
        await server.until(lambda: all(api.published.state.generation == 2 for api in server.apis))
        assert shown(await server.apis[1].ask("more", user="u"))["experiment"] == "more"

    run(scenario, {"ab": AB})


def test_an_experiment_that_leaves_the_file_lets_its_arms_go(run, tmp_path):
    async def scenario(server):
        assert (await server.ask("ab", user="u")).status_code == 200
        recipe_file(tmp_path)
        await server.until(lambda: all(api.published.state.generation == 2 for api in server.apis))
        await server.until(lambda: not any(a.users for api in server.apis for a in api.front.artifacts.values()))
        assert (await server.ask("ab", user="u")).status_code == 404
        assert "experiment" not in shown(await server.ask("assistant", user="u"))
        assert (await server.admin("GET", "experiments")).json()["data"] == []

    run(scenario, {"ab": AB})


def test_an_arm_can_be_the_base_model_and_headers_are_on_errors_too(run):
    async def scenario(server):
        said = [await server.ask("ab", user=user) for user in USERS]
        by_arm = {shown(reply)["arm"]: reply for reply in said}
        assert by_arm["plain"].json()["model"] == BASE
        assert shown(by_arm["plain"])["artifact"] == BASE
        failing = next(user for user, reply in zip(USERS, said, strict=True) if shown(reply)["arm"] == "m1")
        with patched(server.engine, _scheduled=fails):
            reply = await server.ask("ab", user=failing)
        assert reply.status_code == 500
        assert (shown(reply)["arm"], shown(reply)["reason"]) == ("m1", "SPLIT")
        kept = await exposures(server, len(USERS) + 1)
        assert (kept[-1].arm, kept[-1].status, kept[-1].failed) == ("m1", 500, True)

    async def fails(lora_request):
        raise RuntimeError("broken")

    run(scenario, {"ab": {"arms": {"plain": {"serve": "base", "weight": 1}, "m1": 1}, "unit": "user"}}, apis=1)


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({}, 403, None),
        ({"x-vllm-merge-admin-token": "wrong"}, 403, None),
        (ADMIN, 200, "TARGETING_MATCH"),
    ],
)
def test_only_who_has_the_admin_token_may_force_an_arm(run, headers, status, reason):
    async def scenario(server):
        ask = {"model": "assistant", "prompt": "x", "user": "u"}
        for arm in ("m0", "m1"):
            sent = {**headers, "x-vllm-merge-force-arm": arm}
            reply = await server.apis[0].client.post("/v1/completions", json=ask, headers=sent)
            assert reply.status_code == status
            if reason:
                assert (shown(reply)["arm"], shown(reply)["reason"]) == (arm, reason)
                assert read_ticket(reply.headers["x-vllm-merge-exposure"]).counted is False
            else:
                assert TOKEN not in reply.text
        if reason:
            sent = {**headers, "x-vllm-merge-force-arm": "m7"}
            reply = await server.apis[0].client.post("/v1/completions", json=ask, headers=sent)
            assert (reply.status_code, reply.json()["error"]["message"]) == (400, "ab has no arm 'm7' (arms: m0, m1)")
            assert all(not row.counted for row in await exposures(server, 2))

    run(scenario, {"ab": AB}, apis=1)


def test_a_promotion_is_obeyed_by_every_process_moves_the_alias_and_outlives_a_restart(run):
    async def scenario(server):
        reply = await server.apis[1].admin("POST", "experiments/ab/promote", arm="m1", reason="it is better")
        assert (reply.status_code, reply.json()["status"]) == (200, "promoted")
        await promoted(server)

    async def promoted(server):
        for api in server.apis:
            for user in USERS[:6]:
                said = shown(await api.ask("ab", user=user))
                assert (said["arm"], said["reason"], said["cause"]) == ("m1", "STATIC", "promoted")
            reply = await api.ask("assistant", user="anybody")
            assert reply.json()["model"].startswith("m1@")
            assert "experiment" not in shown(reply), "the alias itself stands for the winner now"
        row = (await server.admin("GET", "aliases")).json()["data"][0]
        assert (row["target"], row["file_says"]) == ("m1", "m0")
        (decision,) = (await server.admin("GET", "experiments/ab")).json()["decisions"]
        assert (decision["kind"], decision["arm"], decision["reason"]) == ("promote", "m1", "it is better")

    run(scenario, {"ab": AB})
    run(promoted, {"ab": AB})


def test_a_stop_returns_everybody_to_control_until_the_definition_changes(run, tmp_path):
    async def scenario(server):
        assert (await server.admin("POST", "experiments/ab/stop")).json()["status"] == "stopped"
        for api in server.apis:
            said = [shown(await api.ask("ab", user=user)) for user in USERS]
            assert {(row["arm"], row["reason"], row["cause"]) for row in said} == {("m0", "DISABLED", "stopped")}
        recipe_file(tmp_path, experiments={"ab": {**AB, "coverage": 0.99}})
        await server.until(lambda: all(api.published.state.trials.running["ab"].version == 2 for api in server.apis))
        assert {shown(await server.ask("ab", user=user))["reason"] for user in USERS} >= {"SPLIT"}

    run(scenario, {"ab": AB})


def test_a_stop_leaves_a_promoted_alias_and_says_so_until_it_is_moved_back(run):
    left = {"alias": "assistant", "target": "m1", "before": "m0"}

    async def scenario(server):
        assert (await server.admin("POST", "experiments/ab/stop")).json()["alias_left"] is None
        await server.admin("POST", "experiments/ab/promote", arm="m1")
        for api in reversed(server.apis):
            stopped = (await api.admin("POST", "experiments/ab/stop")).json()
            assert (stopped["status"], stopped["alias_left"]) == ("stopped", left)
        for api in server.apis:
            assert (await api.ask("ab", user="u")).json()["model"].startswith("m0@")
            assert (await api.ask("assistant", user="u")).json()["model"].startswith("m1@")
        assert (await server.admin("POST", "aliases/assistant/back")).json()["target"] == "m0"
        assert (await server.admin("POST", "experiments/ab/stop")).json()["alias_left"] is None
        await server.admin("POST", "experiments/ab/promote", arm="m1")
        await server.admin("POST", "experiments/ab/stop")

    async def restarted(server):
        assert (await server.ask("assistant", user="u")).json()["model"].startswith("m0@"), "as the file says"
        assert (await server.admin("POST", "experiments/ab/stop")).json()["alias_left"] is None

    run(scenario, {"ab": AB})
    run(restarted, {"ab": AB})


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("experiments/ba/promote", {"arm": "m1"}, 404, "no experiment 'ba'"),
        ("experiments/ab/promote", {"arm": "m2"}, 422, "ab has no arm 'm2' (arms: m0, m1)"),
        ("experiments/ba/stop", {"reason": "x"}, 404, "no experiment 'ba'"),
    ],
)
def test_a_wrong_decision_changes_nothing(run, path, body, status, says):
    async def scenario(server):
        reply = await server.admin("POST", path, **body)
        assert reply.status_code == status
        assert says in reply.text
        assert server.published.state.generation == 1
        assert (await server.apis[0].client.post(f"/v1/merge/{path}", json=body)).status_code == 403

    run(scenario, {"ab": AB}, apis=1)


def test_without_a_token_there_is_no_route_that_changes_anything(run):
    async def scenario(server):
        reply = await server.apis[0].client.post("/v1/merge/experiments/ab/stop", json={})
        assert reply.status_code in (404, 405)
        assert (await server.apis[0].client.get("/v1/merge/experiments")).json()["data"][0]["status"] == "running"

    run(scenario, {"ab": AB}, apis=1, ADMIN_TOKEN=None)


def bad_exposures(arm: str, count: int) -> list[Exposure]:
    return [
        Exposure(f"{i:032x}", time.time(), "ab", 1, arm, f"{arm}@1", "SPLIT", unit=f"{i:032x}", status=500, error="x")
        for i in range(count)
    ]


def test_a_breach_returns_the_arm_s_traffic_to_control_at_every_process_and_says_why(run, caplog):
    async def scenario(server):
        before = {user: shown(await server.ask("ab", user=user))["arm"] for user in USERS}
        store = server.published.experiments.open_store()
        await asyncio.to_thread(store.add_exposures, bad_exposures("m1", 400))
        await server.until(lambda: all(api.published.state.trials.decisions for api in server.apis))
        for api in server.apis:
            for user in USERS:
                said = shown(await api.ask("ab", user=user))
                assert said["arm"] == "m0"
                wanted = ("DISABLED", "guardrail errors") if before[user] == "m1" else ("SPLIT", None)
                assert (said["reason"], said.get("cause")) == wanted
        await still_withdrawn(server)
        kept = await exposures(server, 3 * len(USERS))
        assert {row.reason for row in kept} == {"SPLIT", "DISABLED: guardrail errors"}

    async def still_withdrawn(server):
        row = (await server.admin("GET", "experiments/ab")).json()
        arm = next(arm for arm in row["arms"] if arm["arm"] == "m1")
        assert (row["status"], arm["withdrawn"]) == ("running", "guardrail errors")
        (decision,) = row["decisions"]
        assert (decision["kind"], decision["arm"], decision["guardrail"]) == ("breach", "m1", "errors")
        assert "errors of m1" in decision["reason"]

    run(scenario, {"ab": AB})
    assert "arm m1 breaks errors and loses its traffic to control" in caplog.text
    run(still_withdrawn, {"ab": AB})


def test_what_another_replica_decided_is_obeyed_here(run, tmp_path):
    async def scenario(server):
        other = Store.open(str(tmp_path / "store.sqlite"))
        other.decide(Decision("ab", 1, "promote", time.time(), "m1"))
        other.close()
        await server.until(lambda: all(api.published.state.trials.decisions for api in server.apis))
        assert {shown(await api.ask("ab", user="u"))["arm"] for api in server.apis} == {"m1"}

    run(scenario, {"ab": AB})


def test_experiments_behind_one_alias_share_its_users_and_the_rest_get_what_it_stands_for(run):
    async def scenario(server):
        seen = {}
        for user in [f"u{i}" for i in range(60)]:
            reply = await server.ask("assistant", user=user)
            seen.setdefault(shown(reply).get("experiment"), []).append(reply.json()["model"].partition("@")[0])
        assert seen.keys() == {"one", "two", None}
        assert set(seen[None]) == {"m0"}
        assert set(seen["one"]) == {"m0", "m1"}
        assert set(seen["two"]) == {"m0", "m2"}

    def space(start, end):
        return {"alias": "assistant", "unit": "user", "namespace": {"name": "chat", "range": [start, end]}}

    experiments = {
        "one": {"arms": {"m0": 1, "m1": 1}, **space(0, 0.4)},
        "two": {"arms": {"m0": 1, "m2": 1}, **space(0.4, 0.8)},
    }
    run(scenario, experiments, apis=1)


def test_an_arm_that_cannot_be_made_is_never_assigned(run, tmp_path):
    async def scenario(server):
        said = [shown(await api.ask("ab", user=user)) for api in server.apis for user in USERS]
        assert {(row["arm"], row["reason"]) for row in said} == {("m0", "SPLIT"), ("m0", "ERROR")}
        rows = (await server.admin("GET", "experiments/ab")).json()["arms"]
        assert "gone" in next(row for row in rows if row["arm"] == "lost")["failed"]

    experiments = {"ab": {"arms": {"m0": 1, "lost": 1}, "control": "m0", "unit": "user"}}
    config = recipe_file(
        tmp_path,
        experiments=experiments,
        recipes={
            name: {"merge_method": "task_arithmetic", "adapters": [{"adapter": a} for a in used], "load": "lazy"}
            for name, used in {"m0": ("a0", "a1"), "lost": ("a0", "gone")}.items()
        },
    )
    text = config.read_text().replace("adapters:\n", "adapters:\n  gone: {path: ./gone}\n", 1)
    config.write_text(text)
    with patched(played_server, SLOTS=4):
        played(scenario, config, apis=2, STORE=tmp_path / "store.sqlite")
