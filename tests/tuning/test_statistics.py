# SPDX-License-Identifier: Apache-2.0
"""SSR and RegMean in closed form against dense least squares, and their parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_merge import Adapter, LoraFactors, UserInputError, merge
from vllm_merge.tuning.branches import Terms
from vllm_merge.tuning.correction import regmean_correction, ssr_correction
from vllm_merge.tuning.statistics import OFF_DIAGONAL, RIDGE, RegMean, Ssr

CPU = torch.device("cpu")
D_IN, D_OUT, TOKENS = 12, 9, 40


def example(ranks: tuple[int, ...] = (2, 3)) -> tuple[list[Adapter], dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    adapters = [
        Adapter(f"a{i}", {"m": LoraFactors(random(rank, D_IN), random(D_OUT, rank), 0.5 + i)})
        for i, rank in enumerate(ranks)
    ]
    return adapters, {a.name: {"m": random(TOKENS, D_IN) * (1 + i)} for i, a in enumerate(adapters)}


def delta(adapters: list[Adapter], correction) -> Tensor:
    return merge(adapters, merge_method="task_arithmetic", precondition=[correction]).delta("m").double()


def loss(change: Tensor, adapters: list[Adapter], inputs: dict[str, dict[str, Tensor]]) -> float:
    parts = [(change - a.factors["m"].delta().double()) @ inputs[a.name]["m"].double().mT for a in adapters]
    return float(sum(part.square().sum() for part in parts))


def test_ssr_is_the_best_mixture() -> None:
    """No other R does better, the ridge aside; the plain sum does worse."""
    adapters, inputs = example()
    own = delta(adapters, ssr_correction(inputs, ridge=1e-12))
    terms = Terms.of(adapters, "m", CPU)
    best = loss(own, adapters, inputs)
    a, b = terms.A.double(), terms.B.double()
    mixing = torch.linalg.pinv(b) @ own @ torch.linalg.pinv(a)
    for seed in range(5):
        other = mixing + 0.01 * torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert loss(b @ other @ a, adapters, inputs) > best
    assert loss(b @ a, adapters, inputs) > 1.2 * best


def test_regmean_is_its_formula() -> None:
    adapters, inputs = example()
    above, below = torch.zeros(D_OUT, D_IN, dtype=torch.float64), torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for adapter in adapters:
        x = inputs[adapter.name]["m"].double()
        gram = x.mT @ x
        gram = OFF_DIAGONAL * gram + (1 - OFF_DIAGONAL) * torch.diag(gram.diagonal())
        above += adapter.factors["m"].delta().double() @ gram
        below += gram
    expected = above @ torch.linalg.inv(below)
    own = delta(adapters, regmean_correction(inputs))
    assert torch.allclose(own, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [Ssr, RegMean])
def test_fit_is_the_error_there_is(kind: type[Ssr] | type[RegMean]) -> None:
    adapters, inputs = example()
    terms = Terms.of(adapters, "m", CPU)
    statistics = kind.empty(terms.A, terms.B, terms.owner)
    for index, adapter in enumerate(adapters):
        statistics.add(inputs[adapter.name]["m"], index)
    tokens = TOKENS * len(adapters)
    for a in (terms.A.double(), statistics.solved()):
        found = statistics.fit(a)
        assert found.error == pytest.approx(loss(terms.B.double() @ a, adapters, inputs) / tokens, rel=1e-6)
        assert found.size == pytest.approx(loss(0 * terms.B.double() @ a, adapters, inputs) / tokens, rel=1e-6)


@pytest.mark.parametrize("kind", [Ssr, RegMean])
def test_identical_adapters_share_their_inputs(kind: type[Ssr] | type[RegMean]) -> None:
    """Two copies: what both do is done once, with a stack that has no inverse."""
    (one, _), inputs = example((2, 2))
    twice = [one, one.named("again")]
    both = {"a0": inputs["a0"], "again": inputs["a0"]}
    own = delta(twice, ssr_correction(both, ridge=1e-9) if kind is Ssr else regmean_correction(both))
    assert torch.allclose(own, one.factors["m"].delta().double(), atol=1e-4)


@pytest.mark.parametrize("kind", [Ssr, RegMean])
def test_inputs_of_the_base_model_are_left_alone(kind: type[Ssr] | type[RegMean]) -> None:
    """The more they weigh, the less is done to them."""
    adapters, inputs = example()
    terms = Terms.of(adapters, "m", CPU)
    expert, safety = (kind.empty(terms.A, terms.B, terms.owner) for _ in range(2))
    for index, adapter in enumerate(adapters):
        expert.add(inputs[adapter.name]["m"], index)
    kept = torch.randn(3, D_IN, generator=torch.Generator().manual_seed(9))
    safety.add(kept, None)
    moved = []
    for alpha in (100.0, 1.0, 0.01):
        a = kind.combined([expert, safety], [alpha, 1.0]).solved()
        moved.append(float((terms.B.double() @ a @ kept.double().mT).norm()))
    assert moved[0] > moved[1] > 2 * moved[2]


def test_combined_keeps_the_ridge_and_means_over_tokens() -> None:
    adapters, inputs = example()
    terms = Terms.of(adapters, "m", CPU)
    once, twice = Ssr.empty(terms.A, terms.B, terms.owner, ridge=0.3), Ssr.empty(terms.A, terms.B, terms.owner)
    for index, adapter in enumerate(adapters):
        once.add(inputs[adapter.name]["m"], index)
        twice.add(inputs[adapter.name]["m"], index)
        twice.add(inputs[adapter.name]["m"], index)
    assert torch.allclose(Ssr.combined([once], [1.0]).solved(), once.solved())
    assert not torch.allclose(once.solved(), twice.solved(), rtol=1e-3)
    once.ridge = RIDGE
    assert torch.allclose(once.solved(), twice.solved())


def test_missing_inputs_are_said() -> None:
    adapters, inputs = example()
    with pytest.raises(UserInputError, match="no inputs of adapter 'a1' at module 'm'"):
        delta(adapters, ssr_correction({"a0": inputs["a0"]}))


def test_a_correction_is_named_in_the_provenance() -> None:
    adapters, inputs = example()
    merged = merge(adapters, merge_method="task_arithmetic", precondition=["norm_cap", ssr_correction(inputs)])
    assert merged.provenance["precondition"] == ["norm_cap", "ssr of inputs"]
