# SPDX-License-Identifier: Apache-2.0
"""The numbers of a method change only together with its version, which is part of what results are called by."""

from __future__ import annotations

import json

import pytest

from tests.methods.recorded import FILE, fingerprint
from vllm_merge import list_methods

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
NOW = {f"{spec.name}/{space}": spec for spec in list_methods() for space in spec.spaces}


@pytest.mark.parametrize("name", sorted(NOW))
def test_the_numbers_are_those_of_the_version(name: str) -> None:
    assert name in RECORDED, "a new method: run python -m tests.methods.recorded"
    recorded, spec = RECORDED[name], NOW[name]
    assert recorded["version"] == spec.version, "the version was raised: run python -m tests.methods.recorded"
    now = fingerprint(spec.name, name.partition("/")[2])
    message = f"{name} gives other numbers than version {spec.version} did: raise its version"
    assert now[0] == pytest.approx(recorded["fingerprint"][0], rel=2e-5), message
    assert now[1:] == pytest.approx(recorded["fingerprint"][1:], abs=3e-5), message


def test_nothing_is_recorded_that_is_gone() -> None:
    assert set(RECORDED) == set(NOW)


def test_methods_have_fingerprints_of_their_own() -> None:
    prints = {tuple(RECORDED[f"{spec.name}/{spec.default_space}"]["fingerprint"]) for spec in list_methods()}
    assert len(prints) == len(list_methods())
