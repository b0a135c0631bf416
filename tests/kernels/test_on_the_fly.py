# SPDX-License-Identifier: Apache-2.0
"""TIES whose entries are made in the kernels, against the same merge with entries that are stored."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from tests.adapters_in_memory import map_factors, random_adapter, three
from tests.kernels.running import checks_of, interpret, on_a_gpu, run_all
from vllm_merge import Adapter, LoraFactors, MergedAdapter, merge
from vllm_merge.engine.job import Job


def merged(adapters: list[Adapter], space: str, parameters: dict[str, object], device: str) -> MergedAdapter:
    """With the kernels: as a GPU does it by itself, and as the interpreter is made to do it on the CPU."""
    ask = {"merge_method": "ties", "space": space, "parameters": parameters, "rank": "lossless", "device": device}
    if device == "cuda":
        return merge(adapters, **ask)
    with patch.object(Job, "on_the_fly", True):
        return merge(adapters, **ask)


def check(adapters: list[Adapter], device: str) -> None:
    """Equal weight changes and conflicts in both spaces, trimmed by the model and by the module."""
    for space in ("knots", "delta"):
        for parameters in ({}, {"density": 0.5, "trim": "module", "normalize": False}):
            found = merged(adapters, space, parameters, device)
            expected = merge(adapters, merge_method="ties", space=space, parameters=parameters, rank="lossless")
            assert found.factors.keys() == expected.factors.keys()
            for module in expected.factors:
                there, here = found.delta(module).cpu(), expected.delta(module)
                assert torch.linalg.norm(there - here) <= 2e-6 * torch.linalg.norm(here), (space, parameters, module)
            assert found.report.sign_conflict == pytest.approx(expected.report.sign_conflict, abs=1e-3)


def check_three_adapters(device: str) -> None:
    check(three(), device)


def check_adapters_that_cancel(device: str) -> None:
    """x and −x: every sum of theirs is exactly 0 and takes the sign that most sums have."""
    x = random_adapter("x", 4, 1)
    opposite = Adapter("opposite", map_factors(x, lambda f: LoraFactors(f.A, -f.B)).factors)
    check([x, opposite], device)
    check([x, opposite, random_adapter("y", 2, 3)], device)


def test_in_the_interpreter() -> None:
    interpret("tests.kernels.test_on_the_fly", globals())


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("check_of", checks_of(globals()))
def test_on_a_gpu(check_of: Callable[[str], None]) -> None:
    check_of("cuda")


if __name__ == "__main__":
    run_all(globals())
