# SPDX-License-Identifier: Apache-2.0
"""vllm-merge doctor: what it finds, and the one thing that it says to change."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Run
from tests.conftest import DEMO, ROOT
from vllm_merge import diagnosis
from vllm_merge.diagnosis import Check, check_base, check_config, check_memory, check_python, check_torch
from vllm_merge.serving import diagnosis as serving
from vllm_merge.serving.diagnosis import check_entry_points, check_environment


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model that the recipe's adapters fit."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 9}')
    weights = {f"model.layers.{i}.q_proj.weight": torch.zeros(5, 6) for i in range(2)}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts that depend on this machine are in order."""
    for name in ("VLLM_PLUGINS", "VLLM_MERGE_CONFIG", "VLLM_MERGE_CACHE_BYTES", serving.RUNTIME_UPDATES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serving, "check_vllm", lambda: Check("vLLM", "ok", "vllm 0.32"))
    monkeypatch.setattr(serving, "check_entry_points", lambda: Check("plugin", "ok", "there"))
    monkeypatch.setattr(diagnosis, "check_memory", lambda: [Check("memory", "ok", "64.0 GiB available")])


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_all_good(run: Run, recipe: Path, base: Path, healthy: None) -> None:
    code, out, err = run("doctor", base, "--config", recipe)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "All good."
    states = [line.split()[0] for line in out.splitlines()[1:-1]]
    assert set(states) == {"ok"}
    assert any(line.split()[:2] == ["ok", "ranks"] and "--max-lora-rank 8" in line for line in out.splitlines())


def test_the_first_problem_is_the_last_line(
    run: Run, recipe: Path, base: Path, healthy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    code, out, _ = run("doctor", base, "--config", recipe)
    assert code == 0  # warnings only: `vllm-merge serve` works
    assert out.splitlines()[-1] == (
        "All good. You may change: VLLM_PLUGINS: export VLLM_PLUGINS=lora_filesystem_resolver,vllm_merge"
    )
    (recipe.parent / "b/adapter_config.json").unlink()
    monkeypatch.setenv("VLLM_MERGE_CACHE_BYTES", "4GB")
    code, out, _ = run("doctor", base, "--config", recipe)
    assert code == 1
    assert out.splitlines()[-1] == (
        "Change first: VLLM_MERGE_CACHE_BYTES: export VLLM_MERGE_CACHE_BYTES=4294967296 (a whole number of bytes), or "
        "unset it"
    )
    assert (
        f"problem: adapter b: adapter 'b': {recipe.parent}/b has no adapter_config.json; give a folder that PEFT saved"
        in out
    )
    facts = json.loads(run("doctor", base, "--config", recipe, "--json")[1])
    assert facts["good"] is False
    assert facts["change_first"].startswith("export VLLM_MERGE_CACHE_BYTES")
    assert {"name": "Python", "state": "ok"}.items() <= facts["checks"][0].items()


ENVIRONMENTS = {
    "plugins left out, started by hand": (
        {"VLLM_PLUGINS": "x", "VLLM_MERGE_CONFIG": __file__},
        ("VLLM_PLUGINS", "problem", "'x' leaves vllm_merge out", "export VLLM_PLUGINS=x,vllm_merge"),
    ),
    "no plugins": (
        {"VLLM_PLUGINS": ""},
        (
            "VLLM_PLUGINS",
            "warning",
            "'' leaves vllm_merge out; `vllm-merge serve` adds it, `vllm serve` does not",
            "export VLLM_PLUGINS=vllm_merge",
        ),
    ),
    "plugins with ours": ({"VLLM_PLUGINS": "x,vllm_merge"}, ("VLLM_PLUGINS", "ok", "x,vllm_merge", "")),
    "config that is not there": (
        {"VLLM_MERGE_CONFIG": "/no/file"},
        (
            "VLLM_MERGE_CONFIG",
            "problem",
            "/no/file is no file",
            "export VLLM_MERGE_CONFIG=RECIPE_FILE, or unset it",
        ),
    ),
    "runtime updates": (
        {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        (
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
            "warning",
            "set to '1'",
            "unset VLLM_ALLOW_RUNTIME_LORA_UPDATING: recipes do not need it, and it lets clients load adapters from any path",
        ),
    ),
    "cache": (
        {"VLLM_MERGE_CACHE_BYTES": str(2**31)},
        ("VLLM_MERGE_CACHE_BYTES", "ok", "2.0 GiB for merged adapters", ""),
    ),
}


TEXTS = {
    "VLLM_MERGE_ADHOC": ("count=8,rank=32", "onn", "is 'onn'", "give on, off, or limits such as count=16,rank=32"),
    "VLLM_MERGE_ADAPTER_ROOT": ("/", "adapters", "is 'adapters'", "give the absolute path of a folder, or unset it"),
    "VLLM_MERGE_STORE_DAYS": ("90", "x", "is 'x'", "give a whole number of at least 1, or unset it (for ever)"),
    "VLLM_MERGE_JUDGE": ("", "me:secret@host", "is no URL", "give http(s)://HOST/v1, or unset it (no judge)"),
}


@pytest.mark.parametrize("variable", TEXTS)
def test_what_a_server_would_refuse(variable: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor says so, and `serve` before vLLM starts."""
    right, wrong, found, advice = TEXTS[variable]
    assert {check.state for check in check_environment({variable: right}) if check.name == variable} <= {"ok"}
    check = by_name(check_environment({variable: wrong}))[variable]
    assert (check.state, check.found) == ("problem", found)
    assert check.advice.startswith(advice)
    monkeypatch.setenv(variable, wrong)
    monkeypatch.setattr("os.execve", lambda *arguments: pytest.fail("vLLM starts"))
    code, _, error = run("serve", DEMO / "model", "--config", ROOT / "configs" / "demo.yaml")
    assert (code, error) == (2, f"Error: {variable} {found}; {check.advice}\n")


@pytest.mark.parametrize("case", ENVIRONMENTS)
def test_environment(case: str) -> None:
    environment, expected = ENVIRONMENTS[case]
    assert Check(*expected) in list(check_environment(environment))


def test_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_torch().state == "ok"
    monkeypatch.setattr(torch, "__version__", "2.4.1+cu121")
    assert check_torch() == Check(
        "torch",
        "problem",
        f"2.4.1+cu121, {check_torch().found.split(', ', 1)[1]}",
        "install torch 2.9 or newer, the one that your vLLM asks for",
    )
    assert check_python().state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert check_python() == Check(
        "Python", "problem", "3.9.1", "use Python 3.11 or 3.12: make a virtual environment with one of them"
    )


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    assert serving.check_vllm() == Check(
        "vLLM", "problem", "not installed", "run `pip install 'vllm-merge[vllm]'` in this environment"
    )
    monkeypatch.setattr(serving, "entry_points", lambda group: [])
    found = check_entry_points()
    assert (found.state, found.found) == ("problem", "not among vllm.general_plugins and vllm.endpoint_plugins")


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_available_memory", lambda: 1 << 30)
    first = next(check_memory())
    assert (first.name, first.state, first.found) == ("memory", "warning", "1.0 GiB available")


@pytest.mark.parametrize(
    ("line", "state", "found"),
    [
        ("rank: lossless, space: delta,", "problem", "recipe sum keeps the full rank of the weights"),
        ("rank: 513,", "problem", "sum has rank 513"),
        ("rank: 100,", "ok", "at most 100: --max-lora-rank 128"),
    ],
)
def test_ranks(line: str, state: str, found: str, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("adapters: [", f"{line} adapters: ["))
    check = by_name(check_config(recipe, None))["ranks"]
    assert (check.state, check.found) == (state, found)


def test_wrong_config(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("adapter: b", "adapter: c").replace("task_", "tusk_"))
    (check,) = check_config(recipe, None)
    assert check.state == "problem"
    assert check.advice.startswith(f"correct {recipe}:5: recipes.sum.merge_method: unknown merge method")
    assert check.advice.endswith(f"(and 1 more; `vllm-merge validate {recipe}` lists them)")


def test_base_models(recipe: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name(check_config(recipe, str(base)))["base model"].state == "ok"
    missing = by_name(check_base(str(tmp_path / "none")))["base model"]
    assert (missing.state, missing.advice) == ("problem", "correct the path of the base model")
    monkeypatch.setattr(diagnosis, "base_model_folder", lambda model: None)
    not_fetched = by_name(check_config(recipe, None))["base model"]
    assert (not_fetched.state, not_fetched.advice) == ("warning", "fetch it first: `hf download org/base`")
    monkeypatch.undo()
    save_file({"model.layers.1.q_proj.weight": torch.zeros(5, 7)}, base / "model.safetensors")
    misfit = by_name(check_config(recipe, str(base)))["fit of a"]
    assert misfit.state == "problem"
    assert "model.layers.1.q_proj maps 6 to 5 features" in misfit.advice
    (base / "config.json").unlink()
    assert by_name(check_base(str(base)))["base model"].found == f"{base} is not complete"


@pytest.mark.parametrize(("value", "state"), [("8", "ok"), ("0", "problem"), ("many", "problem")])
def test_numbers_of_the_environment(value: str, state: str) -> None:
    check = by_name(check_environment({"VLLM_MERGE_QUEUE": value}))["VLLM_MERGE_QUEUE"]
    assert check.state == state
    assert state == "ok" or check.advice == "export VLLM_MERGE_QUEUE=16 (a whole number), or unset it"
