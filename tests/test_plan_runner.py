# SPDX-License-Identifier: Apache-2.0
"""Plans run end to end: the result is what the recipe says, computed here by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.peft import write_adapter
from vllm_merge.errors import MergeCancelled, MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.plan import Plan, make_plan

MODULES = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]


def factors(seed: int, rank: int, scaling: float = 1.0) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        module: LoraFactors(
            torch.randn(rank, 12, generator=generator), torch.randn(10, rank, generator=generator), scaling
        )
        for module in MODULES
    }


A, B = factors(1, 2, 0.5), factors(2, 3)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    """The plan of recipe r whose text follows the two adapters."""
    for name, content in (("a", A), ("b", B)):
        write_adapter(tmp_path / name, content, base_model="org/base")

    def make(recipes: str, name: str = "r", **options: Any) -> Plan:
        text = f"version: 1\nadapters: {{a: {{path: ./a}}, b: {{path: ./b}}}}\nrecipes:\n{recipes}"
        file = parse_recipes(text, tmp_path / "r.yaml", default_registry())
        catalogue = Catalogue()
        for adapter, entry in file.adapters.items():
            catalogue.register(adapter, entry.path)
        hashes = {adapter: catalogue.content_hash(adapter) for adapter in file.adapters}
        defaults = {"base_model_hash": "", "max_rank": None, "dtype": "float32"}
        return make_plan(file, name, registry=default_registry(), adapter_hashes=hashes, **{**defaults, **options})

    return make


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for module in expected:
        torch.testing.assert_close(found[module], expected[module], rtol=1e-5, atol=1e-5)


def deltas(merged: Any) -> dict[str, torch.Tensor]:
    return {module: pair.delta() for module, pair in merged.factors.items()}


def test_sum_with_weights(plan: Callable[..., Plan]) -> None:
    text = "  r: {merge_method: task_arithmetic, adapters: [{adapter: a, parameters: {weight: 2}}, {adapter: b}]}"
    merged = run_plan(plan(text))
    close(deltas(merged), {m: 2 * A[m].delta() + B[m].delta() for m in MODULES})
    assert (merged.name, merged.base_model, merged.rank) == ("r", "org/base", 5)


def test_gradients_and_filters_reach_the_modules(plan: Callable[..., Plan]) -> None:
    text = (
        "  r: {merge_method: task_arithmetic, parameters: {lambda: [1, 3]}, adapters: ["
        "{adapter: a, parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 5}]}}]}"
    )
    expected = {}
    for layer, share in enumerate((0.0, 0.5, 1.0)):
        mlp, attention = f"model.layers.{layer}.mlp.up_proj", f"model.layers.{layer}.self_attn.q_proj"
        expected[attention] = (1 + 2 * share) * 5 * A[attention].delta()
        expected[mlp] = (1 + 2 * share) * share * A[mlp].delta()
    found = deltas(run_plan(plan(text)))
    found.setdefault("model.layers.0.mlp.up_proj", torch.zeros(10, 12))  # weight 0: the module may be left out
    close(found, expected)


STAGED = """\
  inner: {merge_method: task_arithmetic, adapters: [{adapter: a}, {adapter: b}]}
  r: {merge_method: task_arithmetic, adapters: [{adapter: inner, parameters: {weight: 0.5}}, {adapter: a}]}
"""


def test_stages(plan: Callable[..., Plan]) -> None:
    found = run_plan(plan(STAGED), dtype=torch.float32)
    close(deltas(found), {m: 1.5 * A[m].delta() + 0.5 * B[m].delta() for m in MODULES})


def test_only_the_last_stage_has_the_dtype(plan: Callable[..., Plan]) -> None:
    merged = run_plan(plan(STAGED, dtype="bfloat16", max_rank=4))
    assert {pair.B.dtype for pair in merged.factors.values()} == {torch.bfloat16}
    assert merged.rank == 4


def test_an_adapter_as_it_is(plan: Callable[..., Plan]) -> None:
    merged = run_plan(plan("  r: {merge_method: linear, adapters: [{adapter: b}]}", name="a"))
    close(deltas(merged), {m: A[m].delta() for m in MODULES})
    assert {pair.scaling for pair in merged.factors.values()} == {1.0}
    assert set(merged.report.ranks.values()) == {2}


@pytest.mark.parametrize(
    ("part", "value", "dtype", "message"),
    [
        ("A", torch.nan, "float32", r"adapter 'a', module 'model\.layers\.1\.mlp\.up_proj': .* not finite"),
        ("B", -torch.inf, "float32", r"adapter 'a', module 'model\.layers\.1\.mlp\.up_proj': .* not finite"),
        ("B", 2e5, "float16", r"module 'model\.layers\.1\.mlp\.up_proj': the factors do not fit torch\.float16"),
    ],
)
def test_an_adapter_as_it_is_has_to_be_finite(
    plan: Callable[..., Plan], part: str, value: float, dtype: str, message: str
) -> None:
    """Who reads for a GPU leaves it to what comes next to look."""
    made = plan("  r: {merge_method: linear, adapters: [{adapter: b}]}", name="a", dtype=dtype)
    content = {m: LoraFactors(pair.A.clone(), pair.B.clone(), pair.scaling) for m, pair in A.items()}
    getattr(content["model.layers.1.mlp.up_proj"], part)[1, 1] = value
    with pytest.raises(MergeError, match=f"^{message}"):
        run_plan(made, load_adapter=lambda planned: Adapter(planned.name, content))


def test_the_plan_crosses_processes(plan: Callable[..., Plan]) -> None:
    made = plan(STAGED)
    assert run_plan(Plan.from_json(made.to_json())).tensors_sha256 == run_plan(made).tensors_sha256


def test_provenance_names_contents_not_folders(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = plan(STAGED)
    merged = run_plan(made)
    assert merged.provenance["artifact"] == made.artifact_name
    assert merged.provenance["plan"]["digest"] == made.digest
    assert merged.provenance["plan"]["adapters"]["a"]["content_hash"] == made.adapters["a"].content_hash
    assert str(tmp_path) not in str(merged.provenance)


def test_content_that_changed_is_refused(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made = plan(STAGED)
    (tmp_path / "b/adapter_config.json").write_text((tmp_path / "a/adapter_config.json").read_text())
    with pytest.raises(UserInputError, match=r"^adapter 'b' \(.*/b\): the content changed since it was registered"):
        run_plan(made)


def test_another_dtype_is_refused(plan: Callable[..., Plan]) -> None:
    made = plan(STAGED)
    with pytest.raises(
        MergeError, match=f"^plan {made.artifact_name} is for float32, not torch.float16; make the plan"
    ):
        run_plan(made, dtype=torch.float16)


def test_progress_and_cancelling(plan: Callable[..., Plan]) -> None:
    seen: list[tuple[str, int, int]] = []
    run_plan(plan(STAGED), progress=lambda *step: seen.append(step))
    assert {total for *_, total in seen} == {len(MODULES)}
    with pytest.raises(MergeCancelled):
        run_plan(plan(STAGED), cancelled=lambda: True)
