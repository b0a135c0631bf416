# SPDX-License-Identifier: Apache-2.0
"""Every method gives the same on a CPU and on a GPU, on adapters of the golden cases.

As closely as its arithmetic allows: methods that cut entries off at a threshold, or work in a basis of singular vectors, may
decide the other way about an entry that lies on it, or turn vectors whose singular values are equal, by rounding alone.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.golden import FOLDER, entries, load_case
from vllm_merge import Adapter, MergedAdapter, list_methods, merge
from vllm_merge.methods.registry import default_registry

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMOOTH, ENTRYWISE = 1e-5, 2e-3  # relative, of all modules together
CASES = ("mixed3", "corr4", "norms5", "dup3")
EVERYWHERE = [
    pytest.param(spec.name, space, id=f"{spec.name}-{space}") for spec in list_methods() for space in spec.spaces
]


def adapters_of(case: str, method: str, space: str) -> list[Adapter]:
    """The adapters of a golden case, as many as the method takes, of one rank in `factors`."""
    entry = next(entry for entry in entries() if entry["file"].endswith(f"__{case}.safetensors"))
    adapters = load_case(entry)[0]
    if space == "factors":
        ranks = [adapter.rank for adapter in adapters]
        adapters = [adapter for adapter in adapters if adapter.rank == max(ranks, key=ranks.count)]
        adapters = adapters if len(adapters) > 1 else adapters * 2
    return [Adapter(a.name, a.factors, content_hash=f"{case} {i}") for i, a in enumerate(adapters)][
        : default_registry().get(method).most_adapters
    ]


def distance(one: MergedAdapter, two: MergedAdapter) -> float:
    """‖one − two‖_F / ‖two‖_F over all modules."""
    assert set(one.factors) == set(two.factors)
    pairs = [(one.delta(module).cpu().double(), two.delta(module).double()) for module in two.factors]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("method", "space"), EVERYWHERE)
def test_a_gpu_gives_what_a_cpu_gives(method: str, space: str, case: str) -> None:
    spec = default_registry().get(method)
    adapters = adapters_of(case, method, space)
    arguments = {"merge_method": method, "space": space, "rank": "lossless", "seed": 5}
    on_cpu = merge(adapters, **arguments, device="cpu")  # type: ignore[arg-type]
    on_gpu = merge(adapters, **arguments, device="cuda")  # type: ignore[arg-type]
    assert all(factors.A.is_cuda for factors in on_gpu.factors.values())
    exact = not spec.entrywise and spec.statistics is None
    assert distance(on_gpu, on_cpu) < (SMOOTH if exact else ENTRYWISE)
    for name in ("cosines", "column_overlaps", "row_overlaps"):
        for module, values in getattr(on_cpu.report, name).items():
            found = [0.0 if value is None else value for value in getattr(on_gpu.report, name)[module]]
            assert found == pytest.approx([0.0 if value is None else value for value in values], abs=1e-4)


@pytest.mark.parametrize("precondition", default_registry().precondition_names())
def test_preconditions_too(precondition: str) -> None:
    adapters = adapters_of("corr4", "task_arithmetic", "core")
    arguments = {"merge_method": "task_arithmetic", "precondition": [precondition], "rank": "lossless"}
    on_cpu = merge(adapters, **arguments, device="cpu")  # type: ignore[arg-type]
    assert distance(merge(adapters, **arguments, device="cuda"), on_cpu) < 1e-4  # type: ignore[arg-type]


def test_the_cases_are_there() -> None:
    for case in CASES:
        (file, *_) = sorted(FOLDER.glob(f"*__{case}.safetensors"))
        assert any(key.endswith("lora_A") for key in load_file(file))
