# SPDX-License-Identifier: Apache-2.0
"""The numbers of a method change only together with its version, which is part of what results are called by."""

from __future__ import annotations

import json

import pytest

from tests.methods.recorded import FILE, fingerprint, places
from vllm_merge import list_methods

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
NOW = {name: rest for name, *rest in places()}


@pytest.mark.parametrize("name", sorted(NOW))
def test_the_numbers_are_those_of_the_version(name: str) -> None:
    assert name in RECORDED, "a new method or precondition: run python -m tests.methods.recorded"
    recorded, (spec, space, precondition, version) = RECORDED[name], NOW[name]
    assert recorded["version"] == version, "a version was raised: run python -m tests.methods.recorded"
    now = fingerprint(spec.name, space, precondition)
    message = f"{name} gives other numbers than version {version} did: raise the version"
    assert now[0] == pytest.approx(recorded["fingerprint"][0], rel=2e-5), message
    assert now[1:] == pytest.approx(recorded["fingerprint"][1:], abs=3e-5), message


def test_nothing_is_recorded_that_is_gone() -> None:
    assert set(RECORDED) == set(NOW)


def test_methods_have_fingerprints_of_their_own() -> None:
    prints = {tuple(RECORDED[f"{spec.name}/{spec.default_space}"]["fingerprint"]) for spec in list_methods()}
    assert len(prints) == len(list_methods())


def test_preconditions_change_something() -> None:
    """Each of them does at some method."""
    steps = {precondition for _, _, precondition, _ in NOW.values() if precondition is not None}
    for step in steps:
        changed = [n for n in NOW if n.endswith(f"/{step}") and RECORDED[n] != RECORDED[n.removesuffix(f"/{step}")]]
        prints = [RECORDED[n]["fingerprint"] != RECORDED[n.removesuffix(f"/{step}")]["fingerprint"] for n in changed]
        assert any(prints), step
