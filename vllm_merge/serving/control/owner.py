# SPDX-License-Identifier: Apache-2.0
"""What all API processes of a server serve, kept in one place: the control line of its first worker.

The state (names, plans, aliases) is the API processes' own message; here it only gets a number and goes to every member, a
process that has joined. One change runs at a time. It counts once every member has taken it over: from then on no process
answers from the state before it. A process that ends leaves with its connection, so nobody waits for the dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from vllm_merge.serving.control.control import ControlError, Message, Session

logger = logging.getLogger("vllm_merge.worker")

ADOPT_SECONDS = 10.0  # how long a change waits for API processes that do not answer, before it is reported as open


@dataclass
class _Member:
    pid: int
    adopted: int


class StateOwner:
    """Runs on the control server's loop alone, so no operation is ever half done when another begins."""

    def __init__(self) -> None:
        self._members: dict[Session, _Member] = {}
        self._turns: deque[tuple[Session, asyncio.Future[None]]] = deque()  # the first one has the turn
        self._state: Message | None = None
        self._number = 0
        self._all_adopted = asyncio.Event()

    @property
    def served(self) -> int:
        """The newest state that every member has taken over."""
        return self._number if self._all_adopted.is_set() or not self._number else self._number - 1

    @property
    def members(self) -> list[int]:
        """The ids of the API processes."""
        return sorted(member.pid for member in self._members.values())

    async def handle(self, session: Session, op: str, message: Message) -> Message | None:
        """The answer to one of our operations, None for any other."""
        match op:
            case "join":
                # Its answer is the newest state, which the process takes over before it serves anything.
                self._members[session] = _Member(int(message["pid"]), self._number)
                return {"number": self._number, "state": self._state}
            case "lead":  # the member that joined first
                return {"leads": next(iter(self._members), None) is session}
            case "take_turn":
                await self._take_turn(session)
                return {}
            case "give_turn":
                self._give_turn(session)
                return {}
            case "propose":
                return await self._propose(session, message["state"])
            case "adopted":
                if (member := self._members.get(session)) is not None:
                    member.adopted = max(member.adopted, int(message["number"]))
                    self._look()
                return {}
        return None

    def closed(self, session: Session) -> None:
        self._members.pop(session, None)
        while any(owner is session for owner, _ in self._turns):
            self._give_turn(session)
        self._look()

    async def _take_turn(self, session: Session) -> None:
        """Returns when the session may change the state. A change that some process has not taken over goes first."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (session, turn)
        self._turns.append(entry)
        if self._turns[0] is entry:
            turn.set_result(None)
        try:
            await turn
            if self._number:
                await self._until_adopted()
        except BaseException:
            self._drop(entry)
            raise

    def _give_turn(self, session: Session) -> None:
        entry = next((entry for entry in self._turns if entry[0] is session), None)
        if entry is not None:
            self._drop(entry)

    def _drop(self, entry: tuple[Session, asyncio.Future[None]]) -> None:
        if entry not in self._turns:
            return
        self._turns.remove(entry)
        entry[1].cancel()
        if self._turns and not self._turns[0][1].done():
            self._turns[0][1].set_result(None)

    async def _propose(self, session: Session, state: Message) -> Message:
        if not self._turns or self._turns[0][0] is not session:
            raise ControlError("failed", "a change needs the turn first")
        self._number, self._state = self._number + 1, state
        self._all_adopted.clear()
        for member in self._members:
            member.send({"event": "adopt", "number": self._number, "state": state})
        await self._until_adopted()
        return {"number": self._number}

    async def _until_adopted(self) -> None:
        self._look()
        try:
            async with asyncio.timeout(ADOPT_SECONDS):
                await self._all_adopted.wait()
        except TimeoutError:
            late = ", ".join(str(member.pid) for member in self._members.values() if member.adopted < self._number)
            raise ControlError(
                "busy",
                f"API process {late} has not answered for {ADOPT_SECONDS:.0f} s. The change counts, everywhere, as soon "
                "as it answers or ends; until then old and new may both be served.",
            ) from None

    def _look(self) -> None:
        if all(member.adopted >= self._number for member in self._members.values()):
            self._all_adopted.set()
