# SPDX-License-Identifier: Apache-2.0
"""`plan --server`: bytes as a server has them, and what to change where they do not fit."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.conftest import CONFIG, DEMO
from tests.serving.scraping import scraped, total
from vllm_merge.forecast.server import Decoder, Parallel
from vllm_merge.serving.settings import WorkerSettings

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
GIB = 1 << 30


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CACHE_BYTES", "WORKSPACE_BYTES", "HOST_BYTES", "SOURCE_BYTES", "DISK"):
        monkeypatch.delenv(f"VLLM_MERGE_{variable}", raising=False)


def planned(run: Run, recipe: Path, *options: object) -> dict:
    return json.loads(run("plan", recipe, "--server", *options, "--json")[1])


def test_an_8b_model_on_80_gib(run: Run, recipe: Path, config: Path) -> None:
    options = ("--model", config, "--gpu-memory", "80GiB", "--max-loras", 4, "--max-rank", 64, "--max-model-len", 8192)
    found = planned(run, recipe, *options)
    gpu = found["gpu"]
    assert 14.9 * GIB < gpu["weights"] < 15 * GIB  # 8.03 billion parameters, the norms left out
    # A (rank, d_in) and B (d_out, rank) of q, k, v, o, gate, up, down, and of embedding and head
    layer = (4096 + 4096) * 2 + (1024 + 4096) * 2 + (14336 + 4096) * 3
    assert gpu["slots"] == 4 * 64 * (32 * layer + 2 * (128256 + 4096)) * 2
    assert (gpu["cache"], gpu["merges"], gpu["other"]) == (4 * GIB, 2 * 2147483648, 2 * GIB)
    assert gpu["kv_per_token"] == 2 * 32 * 8 * 128 * 2
    parts = [gpu[name] for name in ("weights", "slots", "cache", "merges", "other", "kv_cache")]
    assert sum(parts) == gpu["usable"] == int(0.9 * 80 * GIB)
    assert gpu["tokens"] == gpu["kv_cache"] // gpu["kv_per_token"]
    assert found["fits"]
    assert found["problems"] == []


def test_what_does_not_fit_fails_and_says_what_to_change(run: Run, recipe: Path, config: Path) -> None:
    code, out, _ = run("plan", recipe, "--server", "--model", config, "--gpu-memory", "24GiB", "--max-model-len", 32768)
    assert code == 1
    assert "does not fit:" in out
    assert "lower VLLM_MERGE_CACHE_BYTES (4.00 GiB now)" in out
    assert "it fits" not in out


def test_what_is_changed_as_it_says_fits(run: Run, recipe: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--model", config, "--gpu-memory", "24GiB", "--max-model-len", 8192)
    assert not planned(run, recipe, *options)["fits"]
    monkeypatch.setenv("VLLM_MERGE_CACHE_BYTES", str(GIB // 2))
    found = planned(run, recipe, *options)
    assert found["gpu"]["cache"] == GIB // 2
    assert found["fits"]


def test_tensor_parallel_splits_weights_and_some_of_the_slots(run: Run, recipe: Path, config: Path) -> None:
    one, four, pipeline = (
        planned(run, recipe, "--model", config, "--max-rank", 16, *options)["gpu"]
        for options in ((), ("--tensor-parallel-size", 4), ("--pipeline-parallel-size", 4))
    )
    assert four["weights"] == pytest.approx(one["weights"] / 4, abs=1)
    assert one["slots"] / 4 < four["slots"] < one["slots"]
    assert pipeline["slots"] < one["slots"]
    assert four["kv_per_token"] == pipeline["kv_per_token"] == one["kv_per_token"] / 4
    assert four["cache"] == one["cache"], "every rank keeps whole artifacts"


@pytest.mark.parametrize(
    ("variables", "options", "said"),
    [
        ({"VLLM_MERGE_CACHE_BYTES": "100"}, (), "set VLLM_MERGE_CACHE_BYTES to at least"),
        ({}, ("--max-rank", 7), "--max-lora-rank 7 is none that vLLM takes"),
    ],
)
def test_problems(
    run: Run, recipe: Path, config: Path, monkeypatch: pytest.MonkeyPatch, variables: dict, options: tuple, said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = planned(run, recipe, "--model", config, *options)
    assert any(said in problem for problem in found["problems"])
    assert not found["fits"]


def test_the_arms_of_an_experiment_need_a_slot_each_and_the_base_model_none(
    run: Run, recipe: Path, config: Path
) -> None:
    arms = "{sum: 1, a: 1, b: 1, base: 1}"
    recipe.write_text(recipe.read_text() + f"experiments: {{trial: {{arms: {arms}}}}}\n")
    (problem,) = planned(run, recipe, "--model", config, "--max-loras", 2)["problems"]
    assert "experiment trial has 3 arms: set --max-loras to at least 3" in problem
    assert planned(run, recipe, "--model", config, "--max-loras", 3)["fits"]


def test_advice(run: Run, recipe: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(run, recipe, "--model", config)["advice"] == []
    monkeypatch.setenv("VLLM_MERGE_SOURCE_BYTES", "10")
    found = planned(run, recipe, "--model", config, "--max-loras", 1)
    assert any("set VLLM_MERGE_SOURCE_BYTES to" in text for text in found["advice"])
    assert any("there are 1 slots" in text for text in found["advice"])
    assert found["fits"], "advice is no reason to fail"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu-memory", "lots", "--model", DEMO / "model"), "--gpu-memory is 'lots'; give bytes with a unit"),
        (("--gpu-memory", "80", "--model", DEMO / "model"), "--gpu-memory is '80'; give bytes with a unit"),
        (("--model", "no/such-model"), "no/such-model is not on this machine"),
        (("sum",), "leave NAME out"),
    ],
)
def test_wrong_options(run: Run, recipe: Path, options: tuple, said: str) -> None:
    code, _, err = run("plan", recipe, *options, "--server")
    assert code == 2
    assert said in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object"),
        ("{}", "has no hidden_size"),
        ('{"hidden_size": "x"}', "has no hidden_size"),
    ],
)
def test_a_wrong_config_is_named(run: Run, recipe: Path, config: Path, text: str, said: str) -> None:
    config.write_text(text)
    code, _, err = run("plan", recipe, "--server", "--model", config)
    assert code == 2
    assert str(config) in err
    assert said in err


def test_experts_and_parts_of_other_models(config: Path) -> None:
    dense = Decoder.from_config(LLAMA_8B, config)
    experts = {**LLAMA_8B, "num_experts": 8, "moe_intermediate_size": 1792}
    mixture = Decoder.from_config({"text_config": experts, "vision_config": {}}, config)
    assert mixture.weights(Parallel()) == dense.weights(Parallel())
    assert mixture.slots(1, 16, "bfloat16", Parallel()) > dense.slots(1, 16, "bfloat16", Parallel())


def test_what_is_planned_is_what_a_real_worker_reserves(run: Run, demo_server) -> None:
    """Slots, budgets and artifacts of the demo's server, which has four slots of rank 64 in float32."""
    options = ("--dtype", "float32", "--max-loras", 4, "--max-rank", 64)
    found, served = planned(run, CONFIG, "--model", DEMO / "model", *options), scraped(demo_server)
    assert found["gpu"]["slots"] == total(served, "vllm_merge_slot_bytes")
    assert found["gpu"]["cache"] == total(served, "vllm_merge_tier_budget_bytes", tier="cache")
    assert found["host"]["sources"] == total(served, "vllm_merge_source_budget_bytes")
    eager = sum(row["bytes_bound"] for row in found["recipes"].values() if row["eager"])
    artifacts = total(served, "vllm_merge_tier_artifacts", tier="cache")
    assert artifacts > 0
    assert total(served, "vllm_merge_tier_bytes", tier="cache") <= eager + artifacts * found["gpu"]["slots"] // 4


def test_the_gpus_share_is_what_the_settings_say() -> None:
    """The same function is what a worker gives its arena: the cache, and twice the workspace."""
    settings = WorkerSettings.read({"VLLM_MERGE_CACHE_BYTES": "7", "VLLM_MERGE_WORKSPACE_BYTES": str(64 << 20)})
    assert settings.merge_bytes_on(80 * GIB) == 2 * (64 << 20)
    assert WorkerSettings.read({}).merge_bytes_on(80 * GIB) == 2 * (80 * GIB // 40)
    assert WorkerSettings.read({}).merge_bytes_on(24 * GIB) == 2 * (24 * GIB // 40)
