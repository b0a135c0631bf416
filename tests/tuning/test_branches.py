# SPDX-License-Identifier: Apache-2.0
"""A merge as live branches is the merge that the engine makes; gradients to the weights are those of finite differences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.tuning.conftest import DATA
from vllm_merge import Adapter, LoraFactors, merge
from vllm_merge.tuning.batches import Encoded
from vllm_merge.tuning.branches import Composition, Sum, Ties, factor_branch
from vllm_merge.tuning.data import PromptSet, read_prompts
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.null_space import NullSpace
from vllm_merge.tuning.objective import Accuracy, Entropy, Loss, Objective

CPU = torch.device("cpu")


def few(adapters: list[Adapter]) -> PromptSet:
    data = read_prompts(DATA, 2)
    names = [adapter.name for adapter in adapters]
    return PromptSet(data.path, tuple(p for p in data.prompts if p.task in names), data.sha256)


def modules_of(adapters: list[Adapter]) -> list[str]:
    return sorted({module for adapter in adapters for module in adapter.factors})


def table_for(adapters: list[Adapter], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (len(modules_of(adapters)), len(adapters))
    return (0.3 + torch.rand(size, generator=generator, dtype=torch.float64)).round(decimals=4)


def ties(adapters: list[Adapter], space: str, trim: str = "global") -> Ties:
    modules = modules_of(adapters)
    density = torch.full((len(modules), len(adapters)), 0.3, dtype=torch.float64)
    scale = torch.full((len(modules),), 1.2, dtype=torch.float64)
    return Ties(adapters, modules, CPU, space=space, density=density, trim=trim, scale=scale)


def weights(table: torch.Tensor, adapters: list[Adapter]) -> list[dict[str, float]]:
    return [dict(zip(modules_of(adapters), column, strict=True)) for column in table.mT.tolist()]


@pytest.mark.parametrize("rule", ["sum", "knots", "core", "knots by module"])
def test_branches_are_the_engines_merge(rule: str, adapters: list[Adapter]) -> None:
    table = table_for(adapters)
    if rule == "sum":
        composition: Composition = Sum(adapters, modules_of(adapters), CPU)
        merged = merge(adapters, merge_method="task_arithmetic", weights=weights(table, adapters))
    else:
        space, trim = rule.split()[0], "module" if "module" in rule else "global"
        composition = ties(adapters, space, trim)
        parameters = {"density": 0.3, "normalize": False, "lambda": 1.2, "trim": trim}
        merged = merge(
            adapters, merge_method="ties", space=space, weights=weights(table, adapters), parameters=parameters
        )
    branches = composition.branches(table.float())
    for module, pair in merged.factors.items():
        x = torch.randn(5, pair.shape[1], generator=torch.Generator().manual_seed(1))
        expected = x @ pair.delta().mT
        assert torch.allclose(branches[module](x), expected, atol=1e-5 * float(expected.abs().max())), module
    assert set(merged.factors) == set(branches)


def test_an_embeddings_branch_looks_tokens_up() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = LoraFactors(torch.randn(2, 10, generator=generator), torch.randn(4, 2, generator=generator), 0.5, True)
    tokens = torch.tensor([[3, 7], [0, 3]])
    expected = pair.delta().mT[tokens]
    assert torch.allclose(factor_branch(pair, CPU)(tokens), expected, atol=1e-6)
    live = Sum([Adapter("a", {"m": pair})], ["m"], CPU).branches(torch.full((1, 1), 2.0))
    assert torch.allclose(live["m"](tokens), 2 * expected, atol=1e-5)


@pytest.fixture
def double(model: TuningModel) -> Iterator[TuningModel]:
    """The model in float64 throughout, in which finite differences are sharp; its norms otherwise work in float32."""

    def norm(module: torch.nn.Module):
        return lambda x: module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()

    norms = [module for module in model._model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms
    model._model.double()
    for module in norms:
        module.forward = norm(module)
    yield model
    for module in norms:
        del module.forward
    model._model.float()


@pytest.mark.parametrize(
    ("rule", "objective"),
    [("sum", "loss"), ("sum", "entropy"), ("sum", "null_space"), ("knots", "loss"), ("core", "entropy")],
)
def test_gradients(rule: str, objective: str, double: TuningModel, adapters: list[Adapter]) -> None:
    """Of three weights, against central differences; the entropy is of answers that do not move."""
    modules = modules_of(adapters)
    composition: Composition = Sum(adapters, modules, CPU) if rule == "sum" else ties(adapters, rule)
    chosen: Objective = {
        "loss": Loss(),
        "entropy": Entropy(8),
        "null_space": NullSpace(adapters, modules, CPU),
    }[objective]
    (batch,) = Encoded(few(adapters), double, answers=objective == "loss", room=8).all()
    table = table_for(adapters).requires_grad_()
    if isinstance(chosen, Entropy):
        with double.attached(composition.branches(table)):
            batch = chosen.answered(double, batch)

    def value(at: torch.Tensor) -> torch.Tensor:
        with double.attached(composition.branches(at)):
            return chosen.rows(double, batch) @ batch.weights.double()

    value(table).backward()
    assert table.grad is not None
    places = table.grad.abs().flatten().topk(40).indices[torch.tensor([0, 17, 39])].tolist()
    for place in places:
        step = torch.zeros(table.numel(), dtype=torch.float64)
        step[place] = 1e-5
        with torch.no_grad():
            up, down = value(table + step.view_as(table)), value(table - step.view_as(table))
        slope = float(up - down) / 2e-5
        assert slope == pytest.approx(float(table.grad.flatten()[place]), rel=1e-4, abs=1e-9), place


def test_only_weights_have_gradients(model: TuningModel, adapters: list[Adapter]) -> None:
    table = table_for(adapters).float().requires_grad_()
    (batch,) = Encoded(few(adapters), model, answers=True).all()
    with model.attached(Sum(adapters, modules_of(adapters), CPU).branches(table)):
        Loss().rows(model, batch).sum().backward()
    assert table.grad is not None
    assert bool((table.grad != 0).any())
    assert all(parameter.grad is None for parameter in model._model.parameters())
    assert not any(factors.A.requires_grad for adapter in adapters for factors in adapter.factors.values())


def test_branches_leave_no_trace(model: TuningModel, adapters: list[Adapter]) -> None:
    (batch,) = Encoded(few(adapters), model, answers=True).all()
    with torch.no_grad():
        before = model.logits(batch.ids, batch.there)
        with model.attached(Sum(adapters, modules_of(adapters), CPU).branches(table_for(adapters).float())):
            during = model.logits(batch.ids, batch.there)
        after = model.logits(batch.ids, batch.there)
    assert torch.equal(before, after)
    assert not torch.allclose(before, during)


def test_one_pass_says_what_generation_says(model: TuningModel, adapters: list[Adapter]) -> None:
    """Of a merge that gets some right and some wrong."""
    data = few(adapters)
    (batch,) = Encoded(data, model, answers=True).all()
    merged = merge(adapters, merge_method="task_arithmetic", parameters={"lambda": 0.75})
    branches = {name: factor_branch(pair, CPU) for name, pair in merged.factors.items()}
    with torch.no_grad(), model.attached(branches):
        wrong = Accuracy().rows(model, batch).tolist()
    given = model.answers(merged.factors, [prompt.prompt for prompt in data.prompts], lambda done: None)
    said = {p.prompt: text != p.answer for p, text in zip(data.prompts, given, strict=True)}
    order = sorted(
        range(len(data.prompts)), key=lambda i: (len(data.prompts[i].prompt) + len(data.prompts[i].answer or ""), i)
    )
    assert [bool(one) for one in wrong] == [said[data.prompts[index].prompt] for index in order]


def test_a_prompt_that_the_context_does_not_hold(tmp_path, model: TuningModel) -> None:
    from vllm_merge import UserInputError

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a ->", "answer": "A"}\n{"prompt": "b ->", "answer": "' + "B" * 256 + '"}\n')
    data = read_prompts(path)
    with pytest.raises(
        UserInputError, match=r"p.jsonl:2: prompt and answer are 262 tokens; the model's context holds 256"
    ):
        Encoded(data, model, answers=True)
    with pytest.raises(UserInputError, match=r"p.jsonl:1: the prompt is 5 tokens long, and its answer may have 252"):
        Encoded(data, model, answers=False, room=252)


def test_an_adapters_own_answer_has_an_end_only_where_it_is_whole(model: TuningModel, adapters: list[Adapter]) -> None:
    from dataclasses import replace
    from types import SimpleNamespace

    from vllm_merge.tuning.methods import answered_by_adapters

    data = few(adapters)
    asked = PromptSet(data.path, tuple(replace(prompt, answer=None) for prompt in data.prompts), data.sha256)
    start = SimpleNamespace(adapters=adapters)
    whole = answered_by_adapters(asked, start, model, 12, "it")
    assert whole.prompts == data.prompts  # the demo's adapters get all of them right
    cut = answered_by_adapters(asked, start, model, 3, "it")
    assert [prompt.answer for prompt in cut.prompts] == [prompt.answer[:3] for prompt in data.prompts]
    assert not any(prompt.ends for prompt in cut.prompts)
    (batch,) = Encoded(cut, model, answers=True).all()
    assert batch.answered.sum(1).tolist() == [3] * len(cut.prompts)
    model.limit(12)
