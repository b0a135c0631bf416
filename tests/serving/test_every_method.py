# SPDX-License-Identifier: Apache-2.0
"""Every merge method and precondition through a real server: its answers are those of the same recipe merged offline.

The recipes are those of configs/methods, over two adapters of one rank so that all of them are served in seconds; as they
stand there, over up to eight adapters, in the long tests. Beside them adapters with LoRA on the token embedding, in the
same server: what they and their merges answer is what PEFT does with the same folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import DEMO, ROOT, servers
from tests.serving.test_exactness import LIMIT, Reference, served
from vllm_merge import Adapter, LoraFactors, load_recipes
from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.adapters.peft import hash_adapter, write_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan

TWO = ("reverse", "vowels")  # both of rank 8; one of them is rsLoRA, and has a module that the other lacks
RANK = 64
SEEN = 0.1  # nats: what a merge changes at least, so that an answer of the base model would be found
EMBED = "model.embed_tokens"
EMBEDDED = {f"embedded-{name}": name for name in TWO}  # the same adapters with LoRA on the embedding
EMBEDDED_RECIPES = {
    "embedded-sum": {"merge_method": "task_arithmetic"},
    "embedded-ties": {"merge_method": "ties", "space": "delta", "rank": 32},
}


def embedded(folder: Path, name: str, source: str) -> Path:
    """The demo's adapter `source` with LoRA on the token embedding beside, of another rank, by PEFT's names."""
    factors = dict(Adapter.from_peft(DEMO / "adapters" / source).factors)
    generator = torch.Generator().manual_seed(len(source))
    a = torch.randn(3, 99, generator=generator)  # the demo's model has 99 tokens, of 256 features
    factors[EMBED] = LoraFactors(a, 0.1 * torch.randn(256, 3, generator=generator), embedding=True)
    write_adapter(folder / name, factors, base_model=None)
    return folder / name


def recipes(whole: bool) -> dict[str, dict[str, Any]]:
    """{name: recipe} of configs/methods, merged at the first request; over TWO unless `whole`."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "configs" / "methods").glob("*.yaml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, recipe in document["recipes"].items():
            adapters = recipe["adapters"] if whole else [{"adapter": adapter} for adapter in TWO]
            found[name] = {**recipe, "adapters": adapters, "load": "lazy"}
    return found


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["two", "whole"])
def method_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of every recipe in `.recipes`, whose file is `.file`."""
    folder = tmp_path_factory.mktemp("methods")
    adapters = {path.name: {"path": str(path)} for path in (DEMO / "adapters").iterdir()}
    adapters |= {name: {"path": str(embedded(folder, name, source))} for name, source in EMBEDDED.items()}
    file = folder / "recipes.yaml"
    document = {"version": 1, "base_model": str(DEMO / "model"), "adapters": adapters}
    inputs = {"adapters": [{"adapter": name} for name in EMBEDDED], "load": "lazy"}
    more = {name: {**recipe, **inputs} for name, recipe in EMBEDDED_RECIPES.items()}
    file.write_text(yaml.safe_dump({**document, "recipes": recipes(request.param) | more}), encoding="utf-8")
    command = servers.merge_serve(DEMO / "model", file, "--max-loras", "4", "--max-lora-rank", str(RANK))
    with servers.running(command) as server:
        server.recipes, server.file = load_recipes(file), file
        yield server


def exported(file: Any, folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """{recipe: PEFT folder} of these recipes, merged offline for a server of rank 64."""
    settings = {
        "registry": default_registry(),
        "adapter_hashes": {name: hash_adapter(source.path) for name, source in file.adapters.items()},
        "base_model_hash": base_model_hash(str(DEMO / "model")),
        "max_rank": RANK,
        "dtype": "float32",
    }
    for name in names:
        run_plan(make_plan(file, name, **settings), report="brief").save_pretrained(folder / name)
    return {name: folder / name for name in names}


def largest(values: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(values, others, strict=True))


def prompts_of(prompts: list[dict[str, str]]) -> list[str]:
    return [next(item["prompt"] for item in prompts if item["task"] == task) for task in (*TWO, "upper")]


def names_of(preconditions: list[Any]) -> set[str]:
    return {name for item in preconditions for name in ([item] if isinstance(item, str) else item)}


def test_every_method_answers_as_its_offline_merge_does(
    method_server: Any, prompts: list[dict[str, str]], tmp_path: Path
) -> None:
    file = method_server.recipes
    methods, preconditions = default_registry().names(), default_registry().precondition_names()
    assert {recipe.merge_method for recipe in file.recipes.values()} == set(methods)
    assert set().union(*(names_of(recipe.precondition) for recipe in file.recipes.values())) == set(preconditions)
    texts = prompts_of(prompts)
    reference = Reference()
    base = reference.base()
    names = [name for name in file.recipes if name not in EMBEDDED_RECIPES]
    with ThreadPoolExecutor(2) as pool:  # the server merges while this process does
        answers = {name: pool.submit(served, method_server, name, texts) for name in names}
        folders = exported(file, tmp_path, names)
        differences, changes = {}, {}
        for name, answer in answers.items():
            sequences, values = answer.result()
            differences[name] = largest(values, reference.logprobs(reference.load(folders[name]), sequences))
            changes[name] = largest(values, reference.logprobs(base, sequences))
    assert {name: found for name, found in differences.items() if found > LIMIT} == {}
    assert {name: found for name, found in changes.items() if found < SEEN} == {}


def test_an_embedding_answers_as_peft_does(method_server: Any, prompts: list[dict[str, str]], tmp_path: Path) -> None:
    """Adapters and merges with LoRA on the embedding, and the base model beside them, all at once.

    The demo's head has the embedding's weight: in PEFT's forward pass as here the adapter changes the embedding alone.
    """
    file, texts, reference = method_server.recipes, prompts_of(prompts), Reference()
    base = reference.base()
    folders = exported(file, tmp_path, EMBEDDED_RECIPES)
    folders |= {name: Path(file.adapters[name].path) for name in EMBEDDED}
    with ThreadPoolExecutor(8) as pool:
        names = [*folders, str(DEMO / "model")]
        answers = {name: pool.submit(served, method_server, name, texts) for name in [*names, *names]}
    for name, folder in folders.items():
        sequences, values = answers[name].result()
        assert largest(values, reference.logprobs(reference.load(folder), sequences)) <= LIMIT, name
        assert largest(values, reference.logprobs(base, sequences)) > SEEN, name
        factors = Adapter.from_peft(folder).factors
        for part in ({EMBED}, factors.keys() - {EMBED}):  # neither is enough by itself
            write_adapter(tmp_path / f"{name}-{len(part)}", {m: factors[m] for m in part}, base_model=None)
            alone = reference.load(tmp_path / f"{name}-{len(part)}")
            assert largest(values, reference.logprobs(alone, sequences)) > SEEN, name
    sequences, values = answers[str(DEMO / "model")].result()
    assert largest(values, reference.logprobs(base, sequences)) <= LIMIT, "rows of the base model stay as they are"
