# SPDX-License-Identifier: Apache-2.0
import asyncio
import stat

import pytest

from vllm_merge.serving.control.control import ControlError, ControlServer, WorkerLink


class Echo:
    """Answers, fails and remembers, as a worker would."""

    def __init__(self):
        self.closed_sessions = 0

    async def handle(self, session, op, message):
        if op == "slow":
            await asyncio.sleep(0.3)
        if op == "busy":
            raise ControlError("busy", "come again")
        if op == "bug":
            raise KeyError("x")
        if op == "shout":
            session.send({"event": "shout", "what": message["what"]})
        return {"op": op, **{k: v for k, v in message.items() if k not in ("id", "op")}}

    def closed(self, session):
        self.closed_sessions += 1


@pytest.fixture
def served(tmp_path):
    echo = Echo()
    server = ControlServer(tmp_path / "worker-1.sock", echo)
    server.start()
    yield server, echo
    server.stop()


def test_answers_come_to_who_asked_in_any_order(served):
    server, _ = served

    async def talk():
        link = WorkerLink(server.path, lambda event: None)
        await link.connect()
        slow = asyncio.create_task(link.call("slow", n=1))
        quick = await link.call("quick", n=2)
        assert not slow.done()
        assert (await slow, quick) == ({"op": "slow", "n": 1}, {"op": "quick", "n": 2})
        await link.close()

    asyncio.run(talk())


def test_errors_keep_their_kind_and_events_arrive(served):
    server, _ = served
    events = []

    async def talk():
        link = WorkerLink(server.path, events.append)
        await link.connect()
        with pytest.raises(ControlError, match="come again") as busy:
            await link.call("busy")
        assert busy.value.kind == "busy"
        with pytest.raises(ControlError, match="KeyError") as bug:
            await link.call("bug")
        assert bug.value.kind == "failed"
        await link.call("shout", what="hello")
        await link.close()

    asyncio.run(talk())
    assert events == [{"event": "shout", "what": "hello"}]


def test_a_connection_that_ends_ends_its_session(served):
    server, echo = served

    async def talk():
        link = WorkerLink(server.path, lambda event: None)
        await link.connect()
        await link.call("hi")
        await link.close()
        for _ in range(100):
            if echo.closed_sessions:
                return
            await asyncio.sleep(0.01)

    asyncio.run(talk())
    assert echo.closed_sessions == 1


def test_a_worker_that_is_gone_is_said_and_not_waited_for(served):
    server, _ = served

    async def talk():
        link = WorkerLink(server.path, lambda event: None)
        await link.connect()
        asyncio.get_running_loop().call_later(0.05, server.stop)
        with pytest.raises(ControlError) as gone:
            await asyncio.wait_for(link.call("slow"), 5)
        assert gone.value.kind == "disconnected"

    asyncio.run(talk())


def test_the_socket_is_the_users_alone(served):
    server, _ = served
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
