# SPDX-License-Identifier: Apache-2.0
"""OPCM: its definition with norms at every step, and going on from an earlier result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, deltas, distance, random_adapter, three
from vllm_merge import Adapter, MergedAdapter, UserInputError, merge
from vllm_merge.adapters.stacking import ModuleGroup
from vllm_merge.algebra import coordinates
from vllm_merge.algebra.coordinates import Bases, Grams
from vllm_merge.algebra.spectral import Triples, triples_of
from vllm_merge.methods import opcm


def run(adapters: list[Adapter], **parameters: Any) -> MergedAdapter:
    return merge(adapters, merge_method="opcm", parameters=parameters, rank="lossless")


def norm(tasks: dict[str, Tensor]) -> float:
    return float(sum(task.square().sum() for task in tasks.values()) ** 0.5)


def reference(adapters: list[Adapter], alpha: float) -> dict[str, Tensor]:
    """As published: λ and the norm after every task, on the support of what is merged."""
    tasks = [deltas(adapter) for adapter in adapters]
    merged, lam, norms = tasks[0], 1.0, [norm(tasks[0])]
    for task in tasks[1:]:
        following = {}
        for module, x in merged.items():
            u, s, vt = torch.linalg.svd(x)
            rank = int((s > 1e-6 * s[0]).sum())
            q = int((s[:rank].cumsum(0) / s.sum() > alpha).int().argmax())
            within = u[:, :rank].mT @ task[module] @ vt[:rank].mT
            removed = torch.diag(within.diag())
            removed[:q, :q] = within[:q, :q]
            following[module] = lam * x + task[module] - u[:, :rank] @ removed @ vt[:rank]
        norms.append(norm(task))
        mean, size = sum(norms) / len(norms), norm(following)
        lam = size / mean
        merged = {module: x * mean / size for module, x in following.items()}
    return merged


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_definition(alpha: float) -> None:
    adapters = [*three(), random_adapter("w", 4, 8)]
    assert distance(run(adapters, alpha=alpha), reference(adapters, alpha)) < 1e-6


def test_one_adapter_is_itself() -> None:
    assert distance(run([three()[0]]), three()[0]) < 1e-6


@pytest.mark.parametrize("shuffle", [False, True])
def test_bases_made_term_by_term_need_smaller_decompositions(monkeypatch: pytest.MonkeyPatch, shuffle: bool) -> None:
    """What a GPU has of bases of full rank: triangular coordinates. Modules of all shapes are decomposed at once."""
    adapters = [random_adapter(str(seed), 3, seed) for seed in range(5)]
    expected = run(adapters, shuffle=shuffle)
    sizes: list[tuple[int, ...]] = []

    def by_cholesky(core: ModuleGroup, grams: Grams, singular: bool) -> Bases:
        (out, left), (into, right) = (
            (torch.linalg.inv(upper), upper + 1e-15)  # with rounding below the diagonal
            for upper in (torch.linalg.cholesky(gram).mT for gram in (grams.B, grams.A))
        )
        counts = torch.full(grams.A.shape[:1], 15)
        return Bases(left, right.mT, out, into, counts, counts)

    def counted(matrix: Tensor) -> Triples:
        sizes.append(tuple(matrix.shape))
        return triples_of(matrix)

    monkeypatch.setitem(coordinates._BUILDERS, "core", by_cholesky)
    monkeypatch.setattr(opcm, "triples_of", counted)
    found = run(adapters, shuffle=shuffle)
    assert distance(found, expected) < 1e-6
    last = [int(name) for name in found.report.continuation["order"]]
    reach = [3 * (max(last[: count + 1]) + 1) for count in range(4)]
    assert sizes == [(len(SHAPES), size, size) for size in reach]
    assert shuffle or reach == [3, 6, 9, 12]


@pytest.mark.parametrize("lam", [1.0, 0.4, {"layers.0.q_proj": 0.3}])
def test_it_goes_on_from_an_earlier_result(lam: object) -> None:
    x, y, z = three()
    whole = run([x, y, z])
    first = run([x, y], **{"lambda": lam}).as_adapter()
    assert distance(run([first, z], resume=True), whole) < 1e-6
    step_by_step = run([run([x]).as_adapter(), y], resume=True)
    assert distance(run([step_by_step.as_adapter(), z], resume=True), whole) < 1e-6


def test_the_state_is_saved_with_the_artifact(tmp_path: Path) -> None:
    x, y, z = three()
    run([x, y]).save_pretrained(tmp_path / "first")
    first = MergedAdapter.from_pretrained(tmp_path / "first")
    assert first.report.continuation["order"] == ["x", "y"]
    assert len(first.report.continuation["norms"]) == 2
    resumed = run([first.as_adapter(), z], resume=True)
    assert distance(resumed, run([x, y, z])) < 1e-6
    assert resumed.report.continuation["order"] == ["x", "y", "z"]
    assert len(resumed.report.continuation["norms"]) == 3


def test_without_resume_a_result_is_an_adapter_like_others() -> None:
    x, y, z = three()
    first = run([x, y]).as_adapter()
    assert distance(run([first, z]), run([x, y, z])) > 1e-2


def test_resume_needs_a_result_of_opcm() -> None:
    with pytest.raises(UserInputError, match=r"the first adapter, 'x', is not a result of opcm.*set resume: false"):
        run(three(), resume=True)
    linear = merge(three(), merge_method="linear").as_adapter()
    with pytest.raises(UserInputError, match="'merged', is not a result of opcm"):
        run([linear, *three()], resume=True)


def test_the_order_is_drawn_with_the_seed_and_reported() -> None:
    adapters = [random_adapter(str(seed), 3, seed) for seed in range(5)]
    orders = set()
    for seed in range(4):
        merged = merge(adapters, merge_method="opcm", parameters={"shuffle": True}, seed=seed, rank="lossless")
        order = merged.report.continuation["order"]
        assert sorted(order) == ["0", "1", "2", "3", "4"]
        assert distance(merged, run([adapters[int(name)] for name in order])) < 1e-6
        orders.add(tuple(order))
    assert len(orders) > 1
    assert run(adapters).report.continuation["order"] == ["0", "1", "2", "3", "4"]


def test_resume_keeps_its_first_when_shuffled() -> None:
    first = run(three()[:1]).as_adapter()
    rest = [random_adapter(str(seed), 3, seed) for seed in range(4)]
    merged = merge(
        [first, *rest], merge_method="opcm", parameters={"shuffle": True, "resume": True}, seed=1, rank="lossless"
    )
    order = merged.report.continuation["order"]
    assert order[0] == "x"
    assert sorted(order[1:]) == ["0", "1", "2", "3"]


def test_a_task_that_undoes_the_first() -> None:
    """−x is what is merged already, up to scale: it is projected away and x stays."""
    x = random_adapter("x", 3, 1)
    opposite = merge([x], merge_method="task_arithmetic", weights=[-1.0]).as_adapter()
    assert distance(run([x, opposite]), x) < 1e-6


def test_norms_are_of_the_whole_model() -> None:
    """Modules share one scale, so leaving one out changes the others."""
    fewer = [Adapter(a.name, dict(list(a.factors.items())[:2])) for a in three()]
    whole, part = run(three()), run(fewer)
    for module in part.factors:
        ratio = part.delta(module) / whole.delta(module)
        assert float(ratio.median()) == pytest.approx(float(ratio.mean()), rel=1e-3)
        assert abs(float(ratio.median()) - 1) > 1e-3
    assert set(part.factors) < set(SHAPES)
