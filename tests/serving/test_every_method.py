# SPDX-License-Identifier: Apache-2.0
"""Every merge method and precondition through a real server: its answers are those of the same recipe merged offline.

The recipes are those of configs/methods, over two adapters of one rank so that all of them are served in seconds; as they
stand there, over up to eight adapters, in the long tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import DEMO, ROOT, servers
from tests.serving.test_exactness import LIMIT, Reference, served
from vllm_merge import load_recipes
from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan

TWO = ("reverse", "vowels")  # both of rank 8; one of them is rsLoRA, and has a module that the other lacks
RANK = 64
SEEN = 0.1  # nats: what a merge changes at least, so that an answer of the base model would be found


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
    adapters = {path.name: {"path": str(path)} for path in (DEMO / "adapters").iterdir()}
    file = tmp_path_factory.mktemp("methods") / "recipes.yaml"
    document = {"version": 1, "base_model": str(DEMO / "model"), "adapters": adapters}
    file.write_text(yaml.safe_dump({**document, "recipes": recipes(request.param)}), encoding="utf-8")
    command = servers.merge_serve(DEMO / "model", file, "--max-loras", "4", "--max-lora-rank", str(RANK))
    with servers.running(command) as server:
        server.recipes, server.file = load_recipes(file), file
        yield server


def exported(file: Any, folder: Path) -> dict[str, Path]:
    """{recipe: PEFT folder} of every recipe, merged offline for a server of rank 64."""
    settings = {
        "registry": default_registry(),
        "adapter_hashes": {name: hash_adapter(source.path) for name, source in file.adapters.items()},
        "base_model_hash": base_model_hash(str(DEMO / "model")),
        "max_rank": RANK,
        "dtype": "float32",
    }
    for name in file.recipes:
        run_plan(make_plan(file, name, **settings), report="brief").save_pretrained(folder / name)
    return {name: folder / name for name in file.recipes}


def largest(values: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(values, others, strict=True))


def names_of(preconditions: list[Any]) -> set[str]:
    return {name for item in preconditions for name in ([item] if isinstance(item, str) else item)}


def test_every_method_answers_as_its_offline_merge_does(
    method_server: Any, prompts: list[dict[str, str]], tmp_path: Path
) -> None:
    file = method_server.recipes
    methods, preconditions = default_registry().names(), default_registry().precondition_names()
    assert {recipe.merge_method for recipe in file.recipes.values()} == set(methods)
    assert set().union(*(names_of(recipe.precondition) for recipe in file.recipes.values())) == set(preconditions)
    texts = [next(item["prompt"] for item in prompts if item["task"] == task) for task in (*TWO, "upper")]
    reference = Reference()
    base = reference.base()
    with ThreadPoolExecutor(2) as pool:  # the server merges while this process does
        answers = {name: pool.submit(served, method_server, name, texts) for name in file.recipes}
        folders = exported(file, tmp_path)
        differences, changes = {}, {}
        for name, answer in answers.items():
            sequences, values = answer.result()
            differences[name] = largest(values, reference.logprobs(reference.load(folders[name]), sequences))
            changes[name] = largest(values, reference.logprobs(base, sequences))
    assert {name: found for name, found in differences.items() if found > LIMIT} == {}
    assert {name: found for name, found in changes.items() if found < SEEN} == {}
