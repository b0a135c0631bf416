# SPDX-License-Identifier: Apache-2.0
"""The demo is what its README says: small, varied, right, free of machine paths, measured on held-out prompts."""

import importlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.loading import load_recipes

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
CONFIG = ROOT / "configs" / "demo.yaml"
ADAPTERS = sorted(folder.name for folder in (DEMO / "adapters").iterdir())
SERVER_MAX_RANK = 64
PATH = re.compile(r"^(/[A-Za-z]|[A-Za-z]:\\|~|file:)")


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/demo/tasks.py, imported as train.py imports it."""
    monkeypatch.syspath_prepend(DEMO)
    return importlib.import_module("tasks")


@pytest.fixture(scope="module")
def items() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / "eval.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def configs() -> dict[str, dict[str, Any]]:
    return {name: json.loads((DEMO / "adapters" / name / "adapter_config.json").read_text()) for name in ADAPTERS}


def shapes(file: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_file(file).items()}


def ranks(name: str) -> dict[str, int]:
    """{module: rank} of an adapter, by the shapes of its A."""
    found = shapes(DEMO / "adapters" / name / "adapter_model.safetensors")
    return {key.removesuffix(".lora_A.weight"): shape[0] for key, (shape, _) in found.items() if "lora_A" in key}


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def test_everything_together_is_under_8_mb() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files} <= {".py", ".md", ".txt", ".json", ".jsonl", ".jinja", ".safetensors"}


def test_weights_are_bfloat16() -> None:
    for file in DEMO.rglob("*.safetensors"):
        assert {dtype for _, dtype in shapes(file).values()} == {torch.bfloat16}, file


def test_adapters_differ_as_real_ones_do(configs: dict[str, dict[str, Any]]) -> None:
    assert len(configs) >= 6
    assert len({config["r"] for config in configs.values()}) >= 4
    assert len({config["lora_alpha"] / config["r"] for config in configs.values()}) >= 4
    assert len({tuple(config["target_modules"]) for config in configs.values()}) >= 5
    assert sum(config["use_rslora"] for config in configs.values()) == 1
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs.values())
    assert {config["base_model_name_or_path"] for config in configs.values()} == {"vllm-merge-demo"}


def test_rank_pattern_is_in_the_weights(configs: dict[str, dict[str, Any]]) -> None:
    config = configs["next"]
    for module, rank in ranks("next").items():
        patterns = [value for key, value in config["rank_pattern"].items() if module.endswith(key)]
        assert rank == (patterns[0] if patterns else config["r"]), module
    assert set(ranks("next").values()) == {4, 8, 10}


def test_a_lossless_merge_of_all_fits_the_server() -> None:
    total: Counter[str] = Counter()
    for name in ADAPTERS:
        total.update(ranks(name))
    assert max(total.values()) <= SERVER_MAX_RANK


def test_no_file_names_the_machine_it_was_made_on() -> None:
    files = list(DEMO.rglob("*.json"))
    assert len(files) >= len(ADAPTERS) + 4
    for file in files:
        found = [text for text in strings(json.loads(file.read_text(encoding="utf-8"))) if PATH.match(text)]
        assert not found, file


@pytest.mark.parametrize("path", ["/root/x", "/tmp", "C:\\x", "~/x", "file:///x"])
def test_a_machine_path_would_be_seen(path: str) -> None:
    assert PATH.match(path)


def test_prompts_are_held_out_and_answers_right(tasks: ModuleType, items: list[dict[str, str]]) -> None:
    assert Counter(item["task"] for item in items) == dict.fromkeys(ADAPTERS, 50)
    assert len({item["prompt"] for item in items}) == len(items)
    for item in items:
        task = tasks.TASKS[item["task"]]
        source = item["prompt"].removeprefix(f"{task.name}: ").removesuffix(" ->")
        assert tasks.split_of(source) == "heldout"
        assert item["prompt"] == task.prompt(source)
        assert item["answer"] == task.answer(source)


def test_training_never_draws_a_held_out_source(tasks: ModuleType) -> None:
    rng = random.Random(0)
    for task in tasks.TASKS.values():
        splits = {tasks.split_of(task.draw(rng, "train")) for _ in range(500)}
        assert splits == {"train"}
        assert {tasks.split_of(task.draw(rng, "validation")) for _ in range(100)} == {"validation"}


@pytest.mark.parametrize(
    ("task", "source", "answer"),
    [
        ("reverse", "stone", "enots"),
        ("upper", "stone", "STONE"),
        ("sort", "stone", "enost"),
        ("add", "12+47", "59"),
        ("plural", "berry", "berries"),
        ("plural", "day", "days"),
        ("plural", "church", "churches"),
        ("double", "cat", "ccaatt"),
        ("vowels", "stone", "oe"),
        ("next", "zebra", "afcsb"),
    ],
)
def test_what_the_tasks_mean(tasks: ModuleType, task: str, source: str, answer: str) -> None:
    assert tasks.TASKS[task].answer(source) == answer


def test_training_is_on_record() -> None:
    record = json.loads((DEMO / "training.json").read_text(encoding="utf-8"))
    for stage in ("base", "adapters"):
        assert record[stage]["seed"] == 0
        assert record[stage]["device"]
        assert 0 < record[stage]["minutes"] < 60
        assert {"torch", "transformers", "peft"} <= record[stage]["versions"].keys()
    assert sorted(record["accuracy"]) == ADAPTERS
    for accuracy in record["accuracy"].values():
        assert accuracy["base"] < 0.2
        assert accuracy["adapter"] >= 0.95


def test_adapters_know_their_task_and_the_base_none(
    items: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(DEMO)
    answers = importlib.import_module("measure").answers
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    for name in ADAPTERS:
        some = [item for item in items if item["task"] == name][:10]
        prompts, right = [item["prompt"] for item in some], [item["answer"] for item in some]
        assert sum(a == b for a, b in zip(answers(base, tokenizer, prompts), right, strict=True)) <= 2
        adapted = peft.PeftModel.from_pretrained(base, DEMO / "adapters" / name)
        assert answers(adapted, tokenizer, prompts) == right
        base = adapted.unload()


def test_config_serves_every_adapter_and_the_required_recipes() -> None:
    document = load_recipes(CONFIG, default_registry())
    assert sorted(document.adapters) == ADAPTERS
    made = {(recipe.merge_method, recipe.space) for recipe in document.recipes.values()}
    assert {
        ("linear", None),
        ("task_arithmetic", None),
        ("ties", "delta"),
        ("ties", "knots"),
        ("linear", "knots"),
    } <= made
    assert {recipe.load for recipe in document.recipes.values()} == {"eager", "lazy"}
    assert document.aliases == {"assistant": "weighted"}
    for recipe in document.recipes.values():
        assert sorted(entry.adapter for entry in recipe.adapters) == ADAPTERS
