# SPDX-License-Identifier: Apache-2.0
"""What a report says of the adapters and the result, against the dense matrices and their singular vectors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, deltas, map_factors, random_adapter, three
from vllm_merge import Adapter, LoraFactors, MergedAdapter, list_methods, merge
from vllm_merge.artifact import MergeReport
from vllm_merge.methods.registry import default_registry

EVERYWHERE = [
    pytest.param(spec.name, space, id=f"{spec.name}-{space}") for spec in list_methods() for space in spec.spaces
]
# The adapters of a report are as the method is given them: do_merging and doge move them before.
AS_GIVEN = [param for param in EVERYWHERE if default_registry().get(str(param.values[0])).prepare is None]


def some(method: str, space: str) -> list[Adapter]:
    """As many adapters as the method takes, of one rank in `factors`."""
    spec = default_registry().get(method)
    adapters = three() if space != "factors" else [random_adapter(name, 3, seed) for seed, name in enumerate("xyz")]
    return adapters[: spec.most_adapters]


def cosine(one: Tensor, two: Tensor) -> float:
    return float((one * two).sum() / (one.norm() * two.norm()))


def overlap(one: Tensor, two: Tensor) -> float:
    """‖U_iᵀU_j‖²_F / min(r_i, r_j) of the column spaces."""
    bases = []
    for matrix in (one, two):
        u, s, _ = torch.linalg.svd(matrix)
        bases.append(u[:, : int((s > 1e-6 * s[0]).sum())])
    return float((bases[0].mT @ bases[1]).square().sum()) / min(basis.shape[1] for basis in bases)


@pytest.mark.parametrize(("method", "space"), AS_GIVEN)
def test_every_method_reports_what_the_dense_matrices_say(method: str, space: str) -> None:
    adapters = some(method, space)
    merged = merge(adapters, merge_method=method, space=space, rank=6)
    report, result = merged.report, deltas(merged)
    tasks = [deltas(adapter) for adapter in adapters]
    chosen = list(itertools.combinations(range(len(tasks)), 2))
    for module in SHAPES:
        expected = [cosine(tasks[i][module], tasks[j][module]) for i, j in chosen]
        assert report.cosines[module] == pytest.approx(expected, abs=2e-5)
        with_result = [cosine(task[module], result[module]) for task in tasks]
        assert report.result_cosines[module] == pytest.approx(with_result, abs=2e-5)
        columns = [overlap(tasks[i][module], tasks[j][module]) for i, j in chosen]
        assert report.column_overlaps[module] == pytest.approx(columns, abs=2e-5)
        rows = [overlap(tasks[i][module].mT, tasks[j][module].mT) for i, j in chosen]
        assert report.row_overlaps[module] == pytest.approx(rows, abs=2e-5)
        sigma = torch.linalg.svdvals(result[module])
        share = (sigma / sigma.sum()).clamp_min(1e-30)
        assert report.effective_rank[module] == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-3)
    whole = [torch.cat([task[m].flatten() for m in SHAPES]) for task in (*tasks, result)]
    assert report.overall["cosines"] == pytest.approx([cosine(whole[i], whole[j]) for i, j in chosen], abs=2e-5)
    assert report.overall["result_cosines"] == pytest.approx([cosine(t, whole[-1]) for t in whole[:-1]], abs=2e-5)
    assert report.overall["norm"] == pytest.approx(float(whole[-1].norm()), rel=1e-5)
    assert report.overall["input_norms"] == pytest.approx([float(t.norm()) for t in whole[:-1]], rel=1e-5)
    mean = sum(value or 0.0 for value in report.effective_rank.values()) / len(SHAPES)
    assert report.overall["effective_rank"] == pytest.approx(mean, abs=2e-5)


@pytest.mark.parametrize(("method", "space"), EVERYWHERE)
def test_sign_conflict_is_there_where_a_method_sees_entries(method: str, space: str) -> None:
    unseen = default_registry().get(method).whole_modules or space == "factors"
    report = merge(some(method, space), merge_method=method, space=space).report
    assert set(report.sign_conflict) == (set() if unseen else set(SHAPES))
    assert (report.overall["sign_conflict"] is None) == unseen


def test_sign_conflict_of_the_sum() -> None:
    """Of dense entries; a negative weight turns a task round, and parts of a module count alike however it is cut."""
    x, y, _ = three()
    for weights in ([1.0, 1.0], [1.0, -2.0]):
        arguments = {"merge_method": "task_arithmetic", "space": "delta", "weights": weights}
        found = merge([x, y], **arguments).report.sign_conflict  # type: ignore[arg-type]
        small = merge([x, y], workspace_bytes=1 << 12, **arguments).report.sign_conflict  # type: ignore[arg-type]
        for module in SHAPES:
            one, two = (w * a.factors[module].delta() for w, a in zip(weights, (x, y), strict=True))
            expected = float((one.sign() * two.sign() < 0).float().mean())
            assert found[module] == small[module] == pytest.approx(expected, abs=2e-5)


def test_one_within_the_other_and_orthogonal() -> None:
    x = random_adapter("x", 4, 1)
    part = map_factors(x, lambda f: LoraFactors(f.A[:2], f.B[:, :2], 3.0))
    away = map_factors(
        random_adapter("away", 2, 5),
        lambda f: LoraFactors(f.A, f.B),
    )
    away = Adapter(
        "away",
        {
            m: LoraFactors(
                f.A - f.A @ torch.linalg.pinv(x.factors[m].A) @ x.factors[m].A,
                f.B - x.factors[m].B @ torch.linalg.pinv(x.factors[m].B) @ f.B,
            )
            for m, f in away.factors.items()
        },
    )
    report = merge([x, part, away], merge_method="linear").report
    for module in SHAPES:
        assert report.column_overlaps[module] == pytest.approx([1, 0, 0], abs=1e-4)
        assert report.row_overlaps[module] == pytest.approx([1, 0, 0], abs=1e-4)


def test_a_module_that_an_adapter_lacks() -> None:
    x, y, z = three()
    fewer = Adapter("y", {m: f for m, f in y.factors.items() if m != "layers.0.q_proj"})
    report = merge([x, fewer, z], merge_method="linear").report
    missing = report.cosines["layers.0.q_proj"]
    assert (missing[0], missing[2]) == (None, None)
    assert missing[1] is not None
    assert report.column_overlaps["layers.0.q_proj"][0] is None
    assert None not in report.overall["column_overlaps"]


def test_one_adapter_and_a_result_that_vanishes() -> None:
    x = three()[0]
    report = merge([x], merge_method="linear").report
    assert report.cosines == {module: [] for module in SHAPES}
    assert report.overall["result_cosines"] == pytest.approx([1.0])
    gone = merge([x, x], merge_method="task_arithmetic", weights=[1.0, -1.0]).report
    assert gone.overall["norm"] == 0.0
    assert gone.overall["cosines"] == [1.0]


def test_brief_leaves_it_out_and_changes_no_byte() -> None:
    full = merge(three(), merge_method="ties")
    brief = merge(three(), merge_method="ties", report="brief")
    assert brief.tensors_sha256 == full.tensors_sha256
    assert (brief.report.cosines, brief.report.overall, brief.report.effective_rank) == ({}, {}, {})
    assert "report" not in brief.report.seconds
    assert brief.report.sign_conflict == full.report.sign_conflict  # TIES counts it anyway
    assert merge(three(), merge_method="linear", report="brief").report.sign_conflict == {}


def test_it_is_saved(tmp_path: object) -> None:
    merged = merge(three(), merge_method="linear")
    merged.save_pretrained(f"{tmp_path}/out")
    again = MergedAdapter.from_pretrained(f"{tmp_path}/out").report
    assert isinstance(again, MergeReport)
    assert again == merged.report
