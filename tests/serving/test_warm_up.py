# SPDX-License-Identifier: Apache-2.0
"""The first merges of each kind: they are what they say, of the model's shapes."""

from __future__ import annotations

import torch

from vllm_merge.methods.registry import list_methods
from vllm_merge.serving.memory.slots import SlotBuffer, module_shapes
from vllm_merge.serving.worker.warm_up import ADAPTERS, KINDS, RANK, compile_kernels, merges, warm_up


def test_every_kind_merges_modules_of_these_shapes():
    shapes = [(160, 192), (64, 144)]
    made = list(merges(torch.device("cpu"), torch.bfloat16, shapes, 256 << 20))
    assert len(made) == len(KINDS)
    linear = made[0]()
    assert {(pair.B.shape[0], pair.A.shape[1]) for pair in linear.factors.values()} == set(shapes)
    assert len(linear.factors) > len(shapes), "a batch of each"
    assert linear.rank == ADAPTERS * RANK
    for one in made[1:]:
        assert one().factors


def test_kinds_have_a_method_for_every_way_of_making_entries():
    """Whatever is made on the fly is made by kernels that the variants hold; one method of each space is merged, too."""
    fly = {method.name for method in list_methods() if method.on_the_fly}
    assert {(method, space) for method, space, _ in KINDS if method in fly} >= {("ties", "knots"), ("ties", "delta")}


def test_the_shapes_are_those_of_the_slots():
    def buffers(module: str | None, d_out: int, d_in: int) -> list[SlotBuffer]:
        a, b = torch.empty(3, 1, 8, d_in), torch.empty(3, 1, d_out, 8)
        return [SlotBuffer("layer", module, "A", a), SlotBuffer("layer", module, "B", b)]

    given = [*buffers("q", 64, 32), *buffers("k", 16, 32), *buffers("v", 16, 32), *buffers(None, 5, 7)]
    assert module_shapes(given) == [(64, 32), (16, 32)]
    assert module_shapes([]) == []


def test_a_cpu_has_nothing_to_warm_up():
    compile_kernels(torch.device("cpu"), torch.bfloat16, 64)
    warm_up(torch.device("cpu"), torch.bfloat16, [(64, 32)], 1 << 20)
