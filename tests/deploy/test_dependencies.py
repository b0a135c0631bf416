# SPDX-License-Identifier: Apache-2.0
"""Dependencies are given by ranges, and what is installed here is within them. (`make audit` asks the network for vulnerabilities.)"""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8"))
GROUPS = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
EVERY = [
    pytest.param(text, id=f"{group or 'always'}-{Requirement(text).name}") for group in GROUPS for text in GROUPS[group]
]


@pytest.mark.parametrize("text", EVERY)
def test_a_dependency_has_a_lowest_version_that_what_is_installed_reaches(text):
    requirement = Requirement(text)
    assert {"==", ">=", "~="} & {part.operator for part in requirement.specifier}, f"{text}: from which version on?"
    assert requirement.url is None, f"{text}: from an index, not from an address"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return  # an extra that is not installed here
    assert requirement.specifier.contains(installed, prereleases=True), f"{requirement.name} {installed} is installed"


def test_what_is_installed_fits_together():
    """Every requirement of what the package always needs, theirs included, is met."""
    waiting, seen = [Requirement(text).name for text in GROUPS[""]], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed = importlib.metadata.version(requirement.name)
            assert requirement.specifier.contains(installed, prereleases=True), f"{name} needs {text}, not {installed}"
            waiting.append(requirement.name)
    assert len(seen) > len(GROUPS[""])
