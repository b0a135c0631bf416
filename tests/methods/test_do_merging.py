# SPDX-License-Identifier: Apache-2.0
"""DO-Merging against the dense definition, its orthogonalisation against autograd, and what holds for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.adapters_in_memory import SHAPES, deltas, distance, map_factors, random_adapter, three, zero_adapter
from tests.methods.cases import HARD, noisy, regauged
from vllm_merge import Adapter, LoraFactors, MergedAdapter, UserInputError, merge

ALONE = {"orthogonalize": "none"}
ADAM = {"orthogonalize": "adam"}
TIES = {**ALONE, "magnitude_rule": "ties", "direction_rule": "ties", "density": 0.4}
FEW = {"steps": 20}
CELLS = [
    pytest.param(space, parameters, id=f"{space}-{name}")
    for space in ("knots", "delta")
    for name, parameters in {"descent": FEW, "adam": {**ADAM, **FEW}, "alone": ALONE, "ties": TIES}.items()
]
each_cell = pytest.mark.parametrize(("space", "parameters"), CELLS)
each_space = pytest.mark.parametrize("space", ["knots", "delta"])


def run(adapters: Sequence[Adapter], space: str, parameters: dict[str, Any], **more: Any) -> MergedAdapter:
    return merge(
        adapters, merge_method="do_merging", space=space, parameters=parameters, **{"rank": "lossless", **more}
    )


def decoupled(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Σ |w_i| α_i and Σ w_i W̄_i by module, dense."""
    result = {}
    for module in SHAPES:
        dense = torch.stack([deltas(adapter)[module] for adapter in adapters])
        alpha, w = dense.norm(dim=1, keepdim=True), torch.tensor(weights, dtype=torch.float64)[:, None, None]
        unit = torch.where(alpha > 0, dense / alpha, 0.0)
        result[module] = ((w.abs() * alpha).sum(0), (w * unit).sum(0))
    return result


@each_space
@pytest.mark.parametrize(
    ("magnitude", "direction", "factor"), [("mean", "mean", 9.0), ("mean", "sum", 3.0), ("sum", "sum", 1.0)]
)
def test_the_definition(space: str, magnitude: str, direction: str, factor: float) -> None:
    parameters = {**ALONE, "magnitude_rule": magnitude, "direction_rule": direction, "lambda": 0.7}
    expected = {m: 0.7 * a * w / factor for m, (a, w) in decoupled(three(), [1, 1, 1]).items()}
    assert distance(run(three(), space, parameters), expected) < 1e-6


def test_means_are_sums_at_one_over_n_squared() -> None:
    sums = {**ALONE, "magnitude_rule": "sum", "direction_rule": "sum", "lambda": 1 / 9}
    assert distance(run(three(), "knots", sums), run(three(), "knots", ALONE)) < 1e-6


@each_space
def test_weights(space: str) -> None:
    weights = [0.5, -2.0, 1.0]
    expected = {m: a * w / 3.5**2 for m, (a, w) in decoupled(three(), weights).items()}
    assert distance(run(three(), space, ALONE, weights=weights), expected) < 1e-6


def test_the_rank_is_exact() -> None:
    """Rank ≤ Σ r_i without truncation, though the row space is none of the adapters'."""
    merged = run(three(), "knots", ALONE)
    assert set(merged.report.ranks.values()) == {10}
    assert set(merged.report.energy_kept.values()) == {None}
    rows = torch.cat([adapter.factors["layers.0.q_proj"].A for adapter in three()]).double()
    outside = merged.delta("layers.0.q_proj").double()
    outside -= outside @ torch.linalg.pinv(rows) @ rows
    assert outside.norm() > 0.1


def test_columns_without_a_direction() -> None:
    """A column that cancels to rounding has none; it is not a unit vector of noise."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 32, generator=generator), torch.randn(24, 2, generator=generator)
    a[1, :8], b[:, 1] = -a[0, :8] * 3, b[:, 0] / 3  # b₀ a₀ + b₁ a₁ = 0 there
    x = Adapter("x", {"layers.0.q_proj": LoraFactors(a, b)})
    y = random_adapter("y", 3, 2)
    for space in ("knots", "delta"):
        merged = run([x, y], space, ALONE).delta("layers.0.q_proj")[:, :8]
        half = y.factors["layers.0.q_proj"].delta()[:, :8] / 4  # x counts as zero, in both means
        assert torch.allclose(merged, half, atol=1e-6)


def test_ties_on_directions() -> None:
    """As TIES of adapters whose columns are of unit length."""
    parameters = {**ALONE, "direction_rule": "ties", "density": 0.3, "magnitude_rule": "sum"}
    units = []
    for adapter in three():
        dense = {m: d / d.norm(dim=0) for m, d in deltas(adapter).items()}
        factors = {m: LoraFactors(torch.eye(d.shape[1]), d.float()) for m, d in dense.items()}
        units.append(Adapter(adapter.name, factors))
    elected = merge(units, merge_method="ties", space="delta", parameters={"density": 0.3}, rank="lossless")
    expected = {m: a * elected.delta(m).double() for m, (a, _) in decoupled(three(), [1, 1, 1]).items()}
    assert distance(run(three(), "delta", parameters), expected) < 1e-5


@each_space
@pytest.mark.parametrize("trim", ["global", "module"])
def test_ties_on_magnitudes(space: str, trim: str) -> None:
    parameters = {**ALONE, "magnitude_rule": "ties", "direction_rule": "sum", "density": 0.3, "trim": trim}
    alpha = [{m: d.norm(dim=0) for m, d in deltas(adapter).items()} for adapter in three()]
    expected = {}
    for module in SHAPES:
        rows = []
        for own in alpha:
            pool = torch.cat(list(own.values())) if trim == "global" else own[module]
            threshold = pool.sort(descending=True).values[int(len(pool) * 0.3)]
            rows.append(torch.where(own[module] >= threshold, own[module], 0.0))
        kept = torch.stack(rows)
        mean = kept.sum(0) / (kept > 0).sum(0).clamp_min(1)
        expected[module] = mean * decoupled(three(), [1, 1, 1])[module][1]
    assert distance(run(three(), space, parameters), expected) < 1e-6


@each_cell
def test_order_does_not_matter(space: str, parameters: dict[str, Any]) -> None:
    x, y, z = three()
    one = run([x, y, z], space, parameters, weights=[0.5, 0.3, 0.9])
    assert distance(run([z, x, y], space, parameters, weights=[0.9, 0.5, 0.3]), one) < 3e-6


@each_cell
def test_scaling_folded_into_b(space: str, parameters: dict[str, Any]) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in three()]
    assert distance(run(folded, space, parameters), run(three(), space, parameters)) < 3e-6


@each_space
def test_copies_give_the_adapter(space: str) -> None:
    x = random_adapter("x", 4, 1, scaling=2.0)
    assert distance(run([x, x, x], space, ALONE), x) < 1e-6


@pytest.mark.parametrize("parameters", [{}, ADAM])
def test_orthogonalised_copies_do_not(parameters: dict[str, Any]) -> None:
    x = random_adapter("x", 4, 1)
    assert distance(run([x, x, x], "knots", parameters), x) > 0.1


@each_space
def test_the_gauge_does_not_matter_alone(space: str) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(other, space, ALONE), run(three(), space, ALONE)) < 2e-5


@pytest.mark.parametrize("parameters", [{}, ADAM])
def test_the_gauge_matters_to_the_orthogonalisation(parameters: dict[str, Any]) -> None:
    other = [regauged(adapter, seed) for seed, adapter in enumerate(three())]
    assert distance(run(other, "knots", parameters), run(three(), "knots", parameters)) > 0.05


@each_cell
def test_a_zero_adapter_is_dropped(space: str, parameters: dict[str, Any]) -> None:
    merged = run([*three()[:2], zero_adapter(), three()[2]], space, parameters, weights=[1.0, 2.0, 9.0, 3.0])
    assert merged.report.dropped_adapters == ["zero"]
    assert merged.tensors_sha256 == run(three(), space, parameters, weights=[1.0, 2.0, 3.0]).tensors_sha256


@each_cell
def test_tiles_do_not_matter(space: str, parameters: dict[str, Any]) -> None:
    assert distance(run(three(), space, parameters, workspace_bytes=1 << 13), run(three(), space, parameters)) < 3e-6


@each_cell
def test_the_same_call_gives_the_same_bytes(space: str, parameters: dict[str, Any]) -> None:
    assert run(three(), space, parameters).tensors_sha256 == run(three(), space, parameters).tensors_sha256


@pytest.mark.parametrize("case", HARD)
@each_cell
def test_hard_adapters(space: str, parameters: dict[str, Any], case: str) -> None:
    """Of a rank that is Σ r_i at most where nothing is dense, and not moved by the noise of rounding."""
    adapters = HARD[case]()
    merged = run(adapters, space, parameters)
    sums = {m: sum(a.factors[m].rank for a in adapters if m in a.factors) for m in SHAPES}
    dense = space == "delta" and parameters is TIES
    for module, rank in merged.report.ranks.items():
        assert rank <= min(*SHAPES[module], SHAPES[module][0] if dense else sums[module])
    other = [noisy(adapter, seed) for seed, adapter in enumerate(adapters)]
    assert distance(run(other, space, parameters), merged) < 1e-6


def test_a_module_of_one_adapter_counts_as_zero_elsewhere() -> None:
    """λ = 1/n² of ΔW, as the definition has it."""
    x, y = three()[:2]
    module = "layers.0.q_proj"
    merged = run([x, Adapter("y", {m: f for m, f in y.factors.items() if m != module})], "knots", ALONE)
    assert torch.allclose(merged.delta(module), x.factors[module].delta() / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("gamma", -1),
        ("norm_power", 3),
        ("lr_scale", 0),
        ("orthogonalize", "sgd"),
        ("direction_rule", "max"),
    ],
)
def test_wrong_parameters(name: str, value: object) -> None:
    with pytest.raises(UserInputError, match=f"parameter '{name}' is {value!r}; allowed is"):
        run(three(), "knots", {name: value})


def autograd(mats: list[Tensor], steps: int, gamma: float, power: int, rate: float) -> list[Tensor]:
    """The same loss, with torch's own gradients and optimizer; mats: (r_i, d) float64."""
    changes = [torch.zeros_like(mat, requires_grad=True) for mat in mats]
    adam = torch.optim.Adam(changes, lr=rate)
    for _ in range(steps):
        moved = [mat + change for mat, change in zip(mats, changes, strict=True)]
        loss = gamma * torch.stack([change.square().sum() for change in changes]).sum()
        for i, one in enumerate(moved):
            for j, two in enumerate(moved):
                if i != j:
                    loss = loss + (one @ two.T).square().sum() ** (power / 2)
        adam.zero_grad()
        loss.backward()
        adam.step()
    return [(mat + change).detach() for mat, change in zip(mats, changes, strict=True)]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_adam_is_torchs(power: int, gamma: float) -> None:
    adapters = [map_factors(adapter, LoraFactors.folded) for adapter in three()]
    own = {"optimizer": "adam", "steps": 30, "gamma": gamma, "norm_power": power, "lr_scale": 0.02}
    merged = merge(adapters, merge_method="task_arithmetic", precondition=[{"do_orthogonalize": own}], rank="lossless")
    expected = {}
    for module in SHAPES:
        sides = []
        for side in (lambda f: f.A.double(), lambda f: f.B.double().mT):
            mats = [side(adapter.factors[module]) for adapter in adapters]
            rms = float(torch.cat([mat.flatten() for mat in mats]).square().mean().sqrt())
            sides.append(autograd(mats, 30, gamma, power, 0.02 * rms))
        expected[module] = torch.stack([b.mT @ a for a, b in zip(*sides, strict=True)]).sum(0)
    assert distance(merged, expected) < 1e-6
