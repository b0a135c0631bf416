# SPDX-License-Identifier: Apache-2.0
"""How long a merge rests after a piece: played streams and a played clock."""

from __future__ import annotations

import pytest

from vllm_merge.serving.memory import arena as module
from vllm_merge.serving.memory.arena import LONGEST_REST, REST, REST_OF_ARITHMETIC, Arena


class Clock:
    """Time passes where somebody lets it pass; rests are written down."""

    def __init__(self) -> None:
        self.now, self.rests = 1000.0, list[float]()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds


class Played:
    """The merge's stream: `behind` seconds of work are left on it. vLLM's: `busy` or not."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.behind, self.busy = clock, 0.0, True

    def synchronize(self) -> None:
        self.clock.now += self.behind
        self.behind = 0.0

    def query(self) -> bool:
        return not self.busy


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def played(clock: Clock) -> Played:
    return Played(clock)


@pytest.fixture
def arena(clock: Clock, played: Played) -> Arena:
    """An arena as on a GPU, within `use`."""
    found = object.__new__(Arena)
    found.device = module.torch.device("cuda")
    found._stream = found._served = played
    found._last_served, found._piece_began, found._waited = 0.0, clock.now, 0.0
    return found


def piece(arena: Arena, played: Played, prepared: float, behind: float, times: float = REST_OF_ARITHMETIC) -> None:
    played.clock.now += prepared
    played.behind = behind
    arena.rest(times)


def test_a_rest_is_by_what_the_gpu_was_waited_for_and_once_what_was_prepared(arena, played, clock):
    piece(arena, played, prepared=0.004, behind=0.002)
    piece(arena, played, prepared=0.0, behind=0.003)
    piece(arena, played, prepared=0.001, behind=0.003, times=REST)
    expected = [0.002 * REST_OF_ARITHMETIC + 0.004 * REST, 0.003 * REST_OF_ARITHMETIC, 0.004 * REST]
    assert clock.rests == pytest.approx(expected)


def test_short_pieces_follow_each_other_and_are_rested_for_together(arena, played, clock):
    for _ in range(3):
        piece(arena, played, prepared=0.0, behind=0.0002)
    assert clock.rests == pytest.approx([0.0006 * REST_OF_ARITHMETIC])


def test_no_rest_is_longer_than_the_longest(arena, played, clock):
    piece(arena, played, prepared=1.0, behind=1.0)
    assert clock.rests == [LONGEST_REST]


def test_nobody_is_rested_for_when_nothing_was_served_of_late(arena, played, clock):
    played.busy = False
    piece(arena, played, prepared=0.002, behind=0.002)
    assert clock.rests == []
    played.busy = True
    piece(arena, played, prepared=0.002, behind=0.002)
    played.busy = False  # between two steps
    piece(arena, played, prepared=0.002, behind=0.002)
    assert len(clock.rests) == 2
