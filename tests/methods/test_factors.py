# SPDX-License-Identifier: Apache-2.0
"""Rules of A and B apart: which invariants hold, by property or by counterexample, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters_in_memory import (
    SHAPES,
    deltas,
    distance,
    map_factors,
    random_adapter,
    three,
    weighted_sum,
    zero_adapter,
)
from tests.methods.cases import HARD, identified, regauged
from vllm_merge import Adapter, LoraFactors, MergedAdapter, list_methods, merge
from vllm_merge.algebra.factorwise import NOT_EXACT
from vllm_merge.errors import UserInputError
from vllm_merge.methods.lora_lego import clustered

TOLERANCE = 3e-6
PEERS = {
    "factor_linear": ("none", "peft", "lorax"),
    "factor_ties": ("none", "peft", "lorax"),
    "factor_dare_linear": ("none", "peft", "lorax"),
    "factor_dare_ties": ("none", "peft", "lorax"),
    "factor_magnitude_prune": ("none", "peft"),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{method}-{peer}": (method, {"compat": peer}) for method, peers in PEERS.items() for peer in peers},
    "factor_ties-frequency": ("factor_ties", {"majority_sign_method": "frequency"}),
    "robustmerge": ("robustmerge", {}),
    "lora_lego": ("lora_lego", {}),
    "lora_lego-6": ("lora_lego", {"target_rank": 6}),
}
OWN = [case for case in CASES if not case.endswith(("-peft", "-lorax"))]
ALL = pytest.mark.parametrize("case", CASES)


def same_rank() -> list[Adapter]:
    """Three adapters of rank 4 with different scalings."""
    return [
        random_adapter("x", 4, 1, scaling=2.0),
        random_adapter("y", 4, 2),
        random_adapter("z", 4, 3, scaling=0.5, size=3.0),
    ]


def run(case: str, adapters: list[Adapter], **more: Any) -> MergedAdapter:
    method, parameters = CASES[case]
    return merge(adapters, **{"merge_method": method, "parameters": parameters, "rank": "lossless", **more})


def test_all_methods_of_the_space_are_here() -> None:
    assert {spec.name for spec in list_methods() if not spec.exact} == {method for method, _ in CASES.values()}


@ALL
def test_the_report_says_that_it_is_no_merge_of_the_weight_changes(case: str) -> None:
    assert NOT_EXACT in run(case, same_rank()).report.warnings


def test_a_merge_of_weight_changes_says_no_such_thing() -> None:
    assert NOT_EXACT not in merge(same_rank(), merge_method="linear").report.warnings


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("factor_linear", {}), ("factor_ties", {"density": 1.0}), ("factor_magnitude_prune", {"density": 1.0})],
)
def test_copies_give_the_adapter(method: str, parameters: dict[str, Any]) -> None:
    """Of mean A times mean B, which is why `compat: none` takes means."""
    x = random_adapter("x", 4, 1, scaling=2.0)
    merged = merge([x, x, x], merge_method=method, parameters=parameters, weights=[1.0, 0.5, 2.0])
    assert distance(merged, x) < TOLERANCE
    assert merged.rank == 4


@pytest.mark.parametrize("case", [case for case in CASES if case != "factor_linear-none"])
def test_copies_do_not_give_the_adapter(case: str) -> None:
    """PEFT and LoRAX double what is merged with itself; trimming and dropping lose; RobustMerge and LEGO rescale."""
    x = random_adapter("x", 4, 1, scaling=2.0)
    assert distance(run(case, [x, x, x]), x) > 1e-2


def test_peft_doubles_what_is_merged_with_itself_by_halves() -> None:
    x = random_adapter("x", 4, 1, scaling=2.0)
    merged = run("factor_linear-peft", [x, x], weights=[0.5, 0.5])
    assert distance(merged, {m: 2 * d for m, d in deltas(x).items()}) < TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("-lorax")])
def test_order_does_not_matter(case: str) -> None:
    x, y, z = identified(same_rank())
    one, two = run(case, [x, y, z], weights=[0.5, 0.3, 0.9]), run(case, [z, x, y], weights=[0.9, 0.5, 0.3])
    assert distance(one, two) < TOLERANCE


def test_order_matters_to_lorax() -> None:
    """The first adapter's alpha / r serves all."""
    x, y, z = same_rank()
    assert distance(run("factor_linear-lorax", [z, x, y]), run("factor_linear-lorax", [x, y, z])) > 0.1


@pytest.mark.parametrize("case", OWN)
def test_scaling_folded_into_b(case: str) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in same_rank()]
    assert distance(run(case, folded), run(case, same_rank())) < TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case not in OWN])
def test_scaling_folded_into_b_matters_to_peers(case: str) -> None:
    folded = [map_factors(adapter, LoraFactors.folded) for adapter in identified(same_rank())]
    folded = identified(folded)
    assert distance(run(case, folded), run(case, identified(same_rank()))) > 1e-2


@ALL
def test_the_gauge_matters(case: str) -> None:
    same = identified(same_rank())
    other = [regauged(adapter, seed) for seed, adapter in enumerate(same)]
    assert distance(run(case, other), run(case, same)) > 1e-2


@ALL
def test_a_zero_adapter_is_dropped(case: str) -> None:
    """Under `compat` too, where the peers would merge its A."""
    merged = run(case, [*same_rank()[:2], zero_adapter(), same_rank()[2]], weights=[1.0, 2.0, 9.0, 3.0])
    assert merged.report.dropped_adapters == ["zero"]
    assert merged.tensors_sha256 == run(case, same_rank(), weights=[1.0, 2.0, 3.0]).tensors_sha256


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("lora_lego")])
def test_ranks_must_be_equal(case: str) -> None:
    with pytest.raises(UserInputError) as caught:
        run(case, three())
    for part in (CASES[case][0], "'layers.0.q_proj'", "'x' has 3", "'y' has 5", "'z' has 2", "rank: 2"):
        assert part in str(caught.value)


def test_the_advice_for_unequal_ranks_works() -> None:
    cut = [merge([a], merge_method="task_arithmetic", rank=2, name=a.name).as_adapter() for a in three()]
    assert run("factor_ties-none", cut).rank == 2


@pytest.mark.parametrize("adapters", ["shared_a", "more_than_fits", "one", "norms_apart", "alphas"])
@ALL
def test_hard_inputs(case: str, adapters: str) -> None:
    """Finite, of the rank that the adapters have, at all modules."""
    given = HARD[adapters]()
    merged = run(case, given)
    assert set(merged.factors) == set(SHAPES)
    for module, factors in merged.factors.items():
        assert factors.rank <= max(given[0].factors[module].rank, CASES[case][1].get("target_rank", 0))
        assert 0 < float(factors.delta().norm()) < float("inf")


@ALL
def test_a_lone_adapter_keeps_its_weight_or_becomes_its_mean(case: str) -> None:
    if "dare" in case or "magnitude" in case or "ties" in case or case == "robustmerge":
        return
    x = random_adapter("x", 4, 1, scaling=2.0)
    share = {"factor_linear-none": -1.0, "factor_linear-peft": -0.5, "factor_linear-lorax": 0.25}.get(case, -0.5)
    assert distance(run(case, [x], weights=[-0.5]), {m: share * d for m, d in deltas(x).items()}) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "share"),
    [("factor_linear-none", 2 / 3), ("factor_linear-peft", 1), ("factor_ties-none", 1), ("lora_lego", 1)],
)
def test_a_module_that_others_lack(case: str, share: float) -> None:
    """It is merged of the adapters that have it; in a mean, the others count as zero, as in `linear`."""
    x, y, z = same_rank()
    module = "layers.1.q_proj"
    without = Adapter("z", {m: f for m, f in z.factors.items() if m != module})
    merged, alone = run(case, [x, y, without]), run(case, [x, y])
    assert torch.allclose(merged.delta(module), share * alone.delta(module), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("workspace", [1 << 18, 1])
@ALL
def test_a_small_workspace_gives_the_same_result(case: str, workspace: int) -> None:
    assert distance(run(case, same_rank(), workspace_bytes=workspace), run(case, same_rank())) < TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if "dare" in case])
def test_masks_come_from_the_seed(case: str) -> None:
    zero, again, other = (run(case, same_rank(), seed=seed) for seed in (0, 0, 1))
    assert zero.tensors_sha256 == again.tensors_sha256
    assert distance(other, zero) > 0.1


def test_dare_rescales_but_not_as_lorax_has_it() -> None:
    """LoRAX computes the rescaling and drops it: of A and of B, so that ΔW shrinks by density² (times s of one adapter)."""
    x = [random_adapter("x", 4, 1, scaling=2.0)]
    with_it = run("factor_dare_linear-peft", x, parameters={"density": 0.5, "compat": "peft"})
    without = run("factor_dare_linear-lorax", x, parameters={"density": 0.5, "compat": "lorax"})
    assert distance({m: 4 * d for m, d in deltas(without).items()}, with_it) < TOLERANCE


def test_trimming_keeps_so_many_entries() -> None:
    x = random_adapter("x", 4, 1)
    pruned = run("factor_magnitude_prune-none", [x], parameters={"density": 0.1})
    for module, (d_out, d_in) in SHAPES.items():
        a, b = x.factors[module].A, x.factors[module].B
        kept = [
            t * (t.abs() >= t.abs().flatten().topk(int(0.1 * 4 * d)).values[-1]) for t, d in ((a, d_in), (b, d_out))
        ]
        assert torch.allclose(pruned.delta(module), kept[1] @ kept[0], atol=1e-6)


def test_lego_with_as_many_clusters_as_terms_is_the_sum() -> None:
    merged = run("lora_lego", three(), parameters={"target_rank": 64}, weights=[0.5, -1.0, 2.0])
    assert distance(merged, weighted_sum(three(), [0.5, -1.0, 2.0])) < TOLERANCE


def test_lego_takes_different_ranks() -> None:
    assert run("lora_lego", three()).rank == 5
    assert run("lora_lego-6", three()).rank == 6


def test_lego_finds_clusters() -> None:
    """Of three tight groups on a line, one of them a single point; the fifth point is padding."""
    points = torch.tensor([[0.0, 1.0], [0.1, 1.0], [5.0, 1.0], [9.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    present = torch.tensor([[True, True, True, True, False]])
    members = clustered((points @ points.T)[None], present, torch.tensor([3]))[0]
    groups = {tuple(column.nonzero()[:, 0].tolist()) for column in members.T}
    assert groups == {(0, 1), (2,), (3,)}


def test_robustmerge_with_nothing_pruned_is_a_product_of_sums() -> None:
    """c = 1 everywhere: A = f Σ A_i, B = f Σ s_i B_i / n."""
    adapters = same_rank()
    merged = run("robustmerge", adapters, parameters={"density": 1.0, "fuse_weight": 3.0})
    for module in SHAPES:
        a = torch.stack([x.factors[module].A for x in adapters]).sum(0)
        b = torch.stack([x.factors[module].B * x.factors[module].scaling for x in adapters]).mean(0)
        assert torch.allclose(merged.delta(module), 9 * b @ a, rtol=1e-4, atol=1e-5)


def test_a_space_that_a_method_lacks_points_to_its_factor_rule() -> None:
    with pytest.raises(UserInputError, match="A and B apart are merged by 'factor_ties'"):
        merge(same_rank(), merge_method="ties", space="factors")


def test_ties_by_count_gives_every_task_one_vote() -> None:
    """A weight scales what a task brings, but not its vote."""
    x = random_adapter("x", 4, 1)
    opposite = Adapter("opposite", {m: LoraFactors(f.A, -0.5 * f.B) for m, f in x.factors.items()})
    merged = merge([x, opposite], merge_method="ties_by_count", weights=[0.1, 9.0], parameters={"density": 1.0})
    assert distance(merged, {m: 0.1 * d for m, d in deltas(x).items()}) < 1e-4
    weighted = merge([x, opposite], merge_method="ties", space="delta", weights=[0.1, 9.0], parameters={"density": 1.0})
    assert distance(weighted, {m: -0.5 * d for m, d in deltas(x).items()}) < 1e-4
