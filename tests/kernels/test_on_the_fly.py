# SPDX-License-Identifier: Apache-2.0
"""Methods whose entries are made in the kernels, against the same merges with entries that are stored."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch

from tests.adapters_in_memory import map_factors, random_adapter, three
from tests.kernels.running import checks_of, interpret, on_a_gpu, run_all
from vllm_merge import Adapter, LoraFactors, MergedAdapter, merge
from vllm_merge.engine.job import Job
from vllm_merge.methods.registry import default_registry, list_methods

CASES: dict[str, tuple[dict[str, object], ...]] = {
    "ties": ({}, {"density": 0.5, "trim": "module", "normalize": False}),
    "dare_ties": ({}, {"density": 0.8, "rescale": "l1", "normalize": False}),
    "dare_linear": ({"density": 0.3}, {"rescale": False}, {"rescale": "l1"}),
    "magnitude_prune": ({}, {"trim": "global", "density": 0.6}),
    "breadcrumbs": ({}, {"density": 0.5, "gamma": 0.2, "rescale": True}),
    "consensus": ({}, {"agreement": 3, "strictness": 0.7}),
    "ties_by_count": ({}, {"density": 0.3, "majority_sign_method": "frequency", "compat": "peft"}),
    "breadcrumbs_ties": ({"gamma": 0.1}, {"normalize": True, "rescale": True, "density": 0.4}),
}
"""Every method that makes its entries in the kernels, with parameters that take other ways through it."""


def merged(adapters: list[Adapter], device: str, **ask: object) -> MergedAdapter:
    """With the kernels: as a GPU does it by itself, and as the interpreter is made to do it on the CPU."""
    if device == "cuda":
        return merge(adapters, **ask, device=device)
    with patch.object(Job, "on_the_fly", True):
        return merge(adapters, **ask, device=device)


def check(adapters: list[Adapter], device: str, method: str = "ties", space: str | None = None, **more: object) -> None:
    """Equal weight changes and conflicts; in all such spaces, unless one is given, which takes the first parameters alone."""
    spaces = [one for one in ("knots", "delta") if one in default_registry().get(method).spaces]
    for parameters in CASES[method][:1] if space else CASES[method]:
        for one in (space,) if space else spaces:
            ask = {"merge_method": method, "space": one, "parameters": parameters, "rank": "lossless", **more}
            found, expected = merged(adapters, device, **ask), merge(adapters, **ask)
            assert found.factors.keys() == expected.factors.keys()
            for module in expected.factors:
                there, here = found.delta(module).cpu(), expected.delta(module)
                distance = float(torch.linalg.norm(there - here) / torch.linalg.norm(here))
                assert distance <= 2e-6, (method, one, parameters, module, distance)
            assert found.report.sign_conflict == pytest.approx(expected.report.sign_conflict, abs=1e-3)


def check_three_adapters(device: str) -> None:
    check(three(), device)


def check_every_method(device: str) -> None:
    """Weights of both signs and densities of each adapter's own; conflicts in sign are counted whatever the method."""
    adapters = [Adapter(a.name, {m: f for m, f in a.factors.items() if "layers.0" in m}) for a in three()]
    for method in CASES:
        if method != "ties":
            share = "strictness" if method == "consensus" else "density"
            own = [{share: value} for value in (0.5, 1.0, 0.35)]
            check(adapters, device, method, weights=[0.7, -0.4, 1.3], adapter_parameters=own, seed=3, report="full")


def check_strips(device: str) -> None:
    """Parts of modules have the masks that the whole has: the workspace holds a few lines of one."""
    check(three(), device, "dare_ties", "delta", workspace_bytes=1 << 13)


def check_adapters_that_cancel(device: str) -> None:
    """x and −x: every sum of theirs is exactly 0 and takes the sign that most sums have."""
    x = random_adapter("x", 4, 1)
    opposite = Adapter("opposite", map_factors(x, lambda f: LoraFactors(f.A, -f.B)).factors)
    check([x, opposite], device)
    check([x, opposite, random_adapter("y", 2, 3)], device)
    for method in ("dare_ties", "breadcrumbs_ties"):
        check([x, opposite, random_adapter("y", 2, 3)], device, method, "knots", weights=[0.3, 0.3, 0.1])


def test_every_method_is_there() -> None:
    assert set(CASES) == {spec.name for spec in list_methods() if spec.on_the_fly}


def test_in_the_interpreter() -> None:
    interpret("tests.kernels.test_on_the_fly", globals())


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("check_of", checks_of(globals()))
def test_on_a_gpu(check_of: Callable[[str], None]) -> None:
    check_of("cuda")


if __name__ == "__main__":
    run_all(globals())
