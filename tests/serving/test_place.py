# SPDX-License-Identifier: Apache-2.0
"""Calls on a place that hangs are given up, and what comes of them later is not lost."""

import gc
import threading
import weakref

import pytest

from vllm_merge.serving.memory.place import Place, PlaceHangs

LONG = 60


class Result:
    """Something whose end can be seen."""


def test_a_call_gives_what_it_returns_and_raises_what_it_raises():
    def fails(error: Exception):
        raise error

    place = Place("place")
    assert place.ask(lambda: 7, LONG) == 7
    for error in (ValueError("no"), TimeoutError("the store says so")):
        with pytest.raises(type(error), match=str(error)):
            place.ask(lambda error=error: fails(error), LONG)
    assert place.submit(lambda: 8).result(LONG) == 8


def test_a_place_that_hangs_is_given_up_once_and_asked_again_when_it_answers():
    place, go, came, undone = Place("place"), threading.Event(), [], threading.Event()

    def undo(result: str) -> None:
        came.append(result)
        undone.set()

    with pytest.raises(PlaceHangs, match=r"no answer within 0\.05 s"):
        place.ask(lambda: go.wait() and "late", 0.05, undo)
    with pytest.raises(PlaceHangs, match="still has no answer"):
        place.ask(lambda: came.append("never asked"), LONG)
    go.set()
    assert undone.wait(LONG)
    assert place.ask(lambda: "again", LONG) == "again"
    assert came == ["late"]


def test_nothing_stays_in_memory_of_what_was_answered():
    place = Place("place")
    results = [weakref.ref(place.ask(Result, LONG))]
    go, late = threading.Event(), []
    with pytest.raises(PlaceHangs):
        place.ask(lambda: go.wait() and Result(), 0.05, lambda result: late.append(weakref.ref(result)))
    go.set()
    place.submit(lambda: None).result(LONG)  # the thread is past what was late
    place.submit(lambda: None).result(LONG)
    gc.collect()
    assert [found() for found in results + late] == [None, None]
