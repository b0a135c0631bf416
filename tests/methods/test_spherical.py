# SPDX-License-Identifier: Apache-2.0
"""SLERP and its relatives against their definitions on dense vectors, and where those leave something open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import golden, golden_mergekit
from tests.adapters_in_memory import SHAPES, deltas, distance, map_factors, random_adapter, three
from tests.test_golden import relative_error
from vllm_merge import Adapter, LoraFactors, UserInputError, merge
from vllm_merge.algebra.spherical import Angles, length, slerp_coefficients

TOLERANCE = 3e-6


def run(adapters: Sequence[Adapter], method: str, **parameters: Any) -> dict[str, Tensor]:
    weights = parameters.pop("weights", None)
    return deltas(merge(adapters, merge_method=method, weights=weights, parameters=parameters, rank="lossless"))


def negative(adapter: Adapter) -> Adapter:
    return map_factors(adapter, lambda f: LoraFactors(f.A, -f.B, f.scaling))


def slerp(x: Tensor, y: Tensor, t: float) -> Tensor:
    theta = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    return (torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_is_the_arc(t: float) -> None:
    x, y, _ = three()
    dense = [deltas(x), deltas(y)]
    expected = {m: slerp(dense[0][m], dense[1][m], t) for m in SHAPES}
    assert distance(run([x, y], "slerp", t=t), expected) < TOLERANCE


def test_slerp_by_module_and_of_the_second_adapter() -> None:
    x, y, _ = three()
    at = {module: index / 4 for index, module in enumerate(SHAPES)}
    dense = [deltas(x), deltas(y)]
    expected = {m: slerp(dense[0][m], dense[1][m], t) for m, t in at.items()}
    assert distance(run([x, y], "slerp", t=at), expected) < TOLERANCE
    alone = merge([x, y], merge_method="slerp", adapter_parameters=[{}, {"t": at}], rank="lossless")
    assert distance(alone, expected) < TOLERANCE


@pytest.mark.parametrize("weights", [[2.0, 0.5], [1.0, -3.0]])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("slerp", {"t": 0.3}),
        ("nearswap", {"t": 0.02}),
        ("model_stock", {"reverse": True}),
        ("model_stock", {"by": "row", "reverse": True}),
    ],
)
def test_weights_are_of_the_changes_before(method: str, parameters: dict[str, Any], weights: list[float]) -> None:
    x, y, _ = three()
    scaled = [
        map_factors(a, lambda f, w=w: LoraFactors(f.A, f.B * w, f.scaling))  # type: ignore[misc]
        for a, w in zip((x, y), weights, strict=True)
    ]
    merged = run([x, y], method, weights=weights, **parameters)
    assert distance(merged, run(scaled, method, **parameters)) < TOLERANCE


def test_slerp_keeps_the_norm_of_tasks_of_one_norm() -> None:
    x, y = (random_adapter(name, 4, seed) for name, seed in (("x", 1), ("y", 2)))
    same = map_factors(y, lambda f: f)
    scale = {m: float(deltas(x)[m].norm() / deltas(y)[m].norm()) for m in SHAPES}
    same = Adapter("y", {m: LoraFactors(f.A, f.B * scale[m]) for m, f in y.factors.items()})
    merged = run([x, same], "slerp", t=0.4)
    for module, value in deltas(x).items():
        assert float(merged[module].norm()) == pytest.approx(float(value.norm()), rel=1e-5)


def test_slerp_goes_straight_between_opposites() -> None:
    """There is no plane between x and −x: the arc is left for the line, which passes through 0."""
    x = random_adapter("x", 4, 1)
    assert distance(run([x, negative(x)], "slerp", t=0.25), {m: 0.5 * v for m, v in deltas(x).items()}) < TOLERANCE
    assert distance(run([x, negative(x)], "nuslerp", weights=[3, 1]), {m: 0.5 * v for m, v in deltas(x).items()}) < 1e-5


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "nearswap"])
def test_more_than_two_are_refused(method: str) -> None:
    with pytest.raises(UserInputError, match=rf"'{method}' .* takes two; found 3 \(x, y, z\)"):
        merge(three(), merge_method=method)


@pytest.mark.parametrize(("by", "dim"), [("row", 1), ("column", 0)])
def test_nuslerp_line_by_line(by: str, dim: int) -> None:
    x, y, _ = three()
    dense = [deltas(x), deltas(y)]
    expected = {}
    for module in SHAPES:
        pairs = zip(dense[0][module].unbind(1 - dim), dense[1][module].unbind(1 - dim), strict=True)
        expected[module] = torch.stack([slerp(one, two, 0.4 / 1.1) for one, two in pairs], dim=1 - dim)
    merged = merge([x, y], merge_method="nuslerp", weights=[0.7, 0.4], parameters={"by": by}, rank="lossless")
    assert distance(merged, expected) < TOLERANCE
    assert merged.rank == x.rank + y.rank


def test_nuslerp_of_lines_that_one_task_lacks() -> None:
    """A zero row counts as orthogonal, as in mergekit: sin((1 − t) π / 2) of the other's."""
    x, y, _ = three()
    half = Adapter(
        "half",
        {
            m: LoraFactors(f.A, torch.cat([f.B[: len(f.B) // 2], 0 * f.B[len(f.B) // 2 :]]))
            for m, f in y.factors.items()
        },
    )
    merged = run([x, half], "nuslerp", by="row", weights=[0.75, 0.25])
    for module, value in deltas(x).items():
        lower = slice(len(value) // 2, None)
        assert torch.allclose(merged[module][lower], math.sin(0.75 * math.pi / 2) * value[lower], atol=1e-6)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "karcher"])
def test_weights_that_cannot_be_normalised(method: str) -> None:
    x, y, _ = three()
    weights = [0.0, 0.0] if method == "karcher" else [1.0, -1.0]
    with pytest.raises(UserInputError, match=rf"'{method}': the weights .* add up to 0 at module 'layers.0.q_proj'"):
        merge([x, y], merge_method=method, weights=weights)


def units(adapters: Sequence[Adapter], module: str) -> tuple[list[Tensor], list[Tensor]]:
    values = [deltas(adapter)[module].flatten() for adapter in adapters]
    norms = [value.norm() for value in values]
    return [value / norm for value, norm in zip(values, norms, strict=True)], norms


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_by_tangents(normalize: bool) -> None:
    """As it is described: to the tangent space at the mean, averaged, back. The tangents' average is 0."""
    weights = [0.4, 0.3, 1.1]
    used = torch.tensor(weights, dtype=torch.float64)
    used = used / used.sum() if normalize else used
    expected = {}
    for module, shape in SHAPES.items():
        unit, norms = units(three(), module)
        mean = torch.stack([w * u for w, u in zip(used, unit, strict=True)]).sum(0)
        mean = mean / mean.norm()
        tangent = torch.stack([w * (u - (u @ mean) * mean) for w, u in zip(used, unit, strict=True)]).sum(0)
        assert float(tangent.norm()) < 1e-12
        expected[module] = (sum(w * n for w, n in zip(used, norms, strict=True)) * mean).view(shape)
    assert distance(run(three(), "multislerp", weights=weights, normalize=normalize), expected) < TOLERANCE


def log_map(mean: Tensor, unit: Tensor) -> Tensor:
    theta = torch.acos((mean @ unit).clamp(-1, 1))
    return theta / torch.sin(theta) * (unit - (mean @ unit) * mean)


def test_karcher_mean_is_where_the_tangents_cancel() -> None:
    weights = [0.5, 0.2, 0.3]
    merged = run(three(), "karcher", weights=[5.0, 2.0, 3.0], max_iter=200, tol=1e-12)
    for module in SHAPES:
        unit, norms = units(three(), module)
        size = merged[module].norm()
        mean = merged[module].flatten() / size
        assert float(size) == pytest.approx(float(sum(w * n for w, n in zip(weights, norms, strict=True))), rel=1e-6)
        tangent = torch.stack([w * log_map(mean, u) for w, u in zip(weights, unit, strict=True)]).sum(0)
        assert float(tangent.norm()) < 1e-5


def test_karcher_stops_where_it_is_told() -> None:
    whole = run(three(), "karcher", weights=[5.0, 2.0, 3.0], max_iter=200, tol=1e-12)
    one = run(three(), "karcher", weights=[5.0, 2.0, 3.0], max_iter=1)
    assert 1e-6 < distance(one, whole) < 0.1
    assert (
        distance(
            run(three(), "karcher", weights=[5.0, 2.0, 3.0], tol=10.0), run(three(), "multislerp", weights=[5, 2, 3])
        )
        < 1e-5
    )


def test_of_two_equal_weights_all_means_on_the_sphere_agree() -> None:
    x, y = (random_adapter(name, 4, seed) for name, seed in (("x", 1), ("y", 2)))
    directions = []
    for method in ("karcher", "multislerp"):
        merged = run([x, y], method)
        directions.append({m: value / value.norm() for m, value in merged.items()})
    assert distance(directions[0], directions[1]) < 1e-5


@pytest.mark.parametrize("method", ["karcher", "multislerp"])
def test_opposites_have_no_mean_direction(method: str) -> None:
    """x, −x and 3 x of a weight that cancels: the weighted mean, in any order, in place of a direction of rounding."""
    x = random_adapter("x", 4, 1)
    large = map_factors(x, lambda f: LoraFactors(f.A, 3 * f.B, f.scaling))
    for adapters in ([large, negative(x)], [negative(x), large]):
        assert distance(run(adapters, method), x) < 1e-5


def test_model_stock_by_its_formula() -> None:
    one, two, three_ = (random_adapter(name, 3, seed) for name, seed in (("x", 1), ("y", 2), ("z", 3)))
    common = random_adapter("common", 4, 9, size=1.5)
    adapters = [
        Adapter(
            a.name,
            {
                m: LoraFactors(torch.cat([f.A, common.factors[m].A]), torch.cat([f.B, common.factors[m].B], 1))
                for m, f in a.factors.items()
            },
        )
        for a in (one, two, three_)
    ]
    expected = {}
    for module in SHAPES:
        values = [deltas(a)[module] for a in adapters]
        cosines = [float((p * q).sum() / (p.norm() * q.norm())) for i, p in enumerate(values) for q in values[i + 1 :]]
        cosine = sum(cosines) / 3
        assert cosine > 0.3
        expected[module] = 3 * cosine / (1 + 2 * cosine) * torch.stack(values).mean(0)
    assert distance(run(adapters, "model_stock"), expected) < TOLERANCE


def test_model_stock_where_tasks_point_apart() -> None:
    """Nothing; asked to, it turns the mean around as the formula does."""
    x = random_adapter("x", 4, 1)
    y = random_adapter("y", 4, 2)
    apart = Adapter(
        "apart",
        {
            m: LoraFactors(torch.cat([f.A, y.factors[m].A]), torch.cat([-f.B, 2 * y.factors[m].B], 1))
            for m, f in x.factors.items()
        },
    )
    assert merge([x, apart], merge_method="model_stock").factors == {}
    turned = run([x, apart], "model_stock", reverse=True)
    for module in SHAPES:
        p, q = deltas(x)[module], deltas(apart)[module]
        cosine = float((p * q).sum() / (p.norm() * q.norm()))
        assert cosine < -0.1
        assert torch.allclose(turned[module], 2 * cosine / (1 + cosine) * (p + q) / 2, atol=1e-6)
    assert merge([x, negative(x)], merge_method="model_stock", parameters={"reverse": True}).factors == {}


def test_a_peers_rows_are_columns() -> None:
    """mergekit's `nuslerp_row_wise: true`, which takes columns: our rows are far from it."""
    (entry,) = (e for e in golden.entries() if e["file"] == "mergekit_nuslerp_rows__pair2.safetensors")
    recipe = golden_mergekit.recipe_for(entry)
    assert recipe is not None
    adapters, expected = golden.load_case(entry)
    arguments = {"weights": entry["weights"], "rank": "lossless", **recipe}
    assert relative_error(merge(adapters, **arguments), expected) <= entry["tolerance"]
    rows = {**arguments, "parameters": {"by": "row"}}
    assert relative_error(merge(adapters, **rows), expected) > 0.01


def test_gram_of_cores_and_angles() -> None:
    gram = torch.tensor([[[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    angles = Angles.of(gram)
    assert angles.norms.tolist() == [[2, 2, 0]]
    assert angles.cosines[0].tolist() == [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]]
    assert float(length(torch.tensor([[1.0, 1.0, 5.0]], dtype=torch.float64), angles.cosines)) == pytest.approx(3**0.5)
    straight = slerp_coefficients(torch.tensor(1.0), torch.tensor(0.25), torch.tensor(True))
    assert straight.tolist() == [0.75, 0.25]
