# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, how it exits, what it leaves on disk."""

import errno
import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.cli.conftest import RECIPE, Run, factors
from vllm_merge import MergedAdapter
from vllm_merge.adapters.peft import read_adapter, write_adapter

COMMANDS = (
    "serve",
    "merge",
    "plan",
    "validate",
    "methods",
    "schema",
    "inspect",
    "doctor",
    "eval",
    "tune",
    "search",
    "osrm",
)
SCHEMA = Path(__file__).parents[2] / "configs/recipe.schema.json"


def test_merge(run: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, err = run("merge", recipe, "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    found = read_adapter(tmp_path / "out")
    for module, pair in found.factors.items():
        expected = 0.5 * factors(1, 2)[module].delta() + factors(2, 1)[module].delta()
        torch.testing.assert_close(pair.delta(), expected, rtol=1e-5, atol=1e-5)
    artifact = MergedAdapter.from_pretrained(tmp_path / "out").provenance["artifact"]
    assert out == f"{artifact} → {tmp_path}/out\n2 modules, rank 3, 264 B, nothing cut off\n"
    assert found.base_model == "org/base"


def test_merge_json_is_the_plans(run: Run, recipe: Path, tmp_path: Path) -> None:
    options = ("--dtype", "bfloat16", "--max-rank", "2", "--json")
    code, out, _ = run("merge", recipe, "best", "-o", tmp_path / "out", *options)
    merged = json.loads(out)
    planned = json.loads(run("plan", recipe, "best", *options)[1])
    assert code == 0
    assert merged["digest"] == planned["plan"]["digest"]
    assert (merged["rank"], planned["rank_bound"]) == (2, 2)
    assert (merged["bytes"], planned["bytes_bound"]) == (88, 88)
    assert 0 < merged["least_energy_kept"] < 1
    assert merged["path"] == str(tmp_path / "out")


def test_merge_of_an_adapter_alone(run: Run, recipe: Path, tmp_path: Path) -> None:
    assert run("merge", recipe, "a", "-o", tmp_path / "out")[0] == 0
    found = read_adapter(tmp_path / "out")
    torch.testing.assert_close(found.factors["model.layers.1.q_proj"].A, factors(1, 2)["model.layers.1.q_proj"].A)


def test_merge_again_replaces_its_result(run: Run, recipe: Path, tmp_path: Path) -> None:
    first = json.loads(run("merge", recipe, "-o", tmp_path / "out", "--json")[1])
    recipe.write_text(RECIPE.replace("0.5", "0.7"))
    second = json.loads(run("merge", recipe, "-o", tmp_path / "out", "--json")[1])
    assert first["digest"] != second["digest"]
    assert MergedAdapter.from_pretrained(tmp_path / "out").tensors_sha256 == second["tensors_sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "r.yaml"]


@pytest.mark.parametrize("content", [["notes.txt"], ["adapter_config.json"]])
def test_merge_keeps_what_is_not_its_own(content: list[str], run: Run, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in content:
        (tmp_path / "out" / name).write_text("mine")
    code, out, err = run("merge", recipe, "-o", tmp_path / "out")
    found = "notes.txt" if content == ["notes.txt"] else "parts of a result"
    assert (code, out) == (2, "")
    assert err == (
        f"Error: {tmp_path}/out: is neither empty nor a result of vllm-merge (it has {found}); choose "
        "another --output\n"
    )
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_merge_that_fails_leaves_nothing(run: Run, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("0.5", "1.0e+39"))
    code, _, err = run("merge", recipe, "-o", tmp_path / "out")
    assert code == 1
    assert err.startswith("Error: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "r.yaml"]


def test_wrong_recipe(run: Run, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("task_arithmetic", "task_arithmetics").replace("adapter: b", "adapter: c"))
    for command in (("validate", recipe), ("plan", recipe), ("merge", recipe, "-o", recipe.parent / "out")):
        code, out, err = run(*command)
        first, second = err.splitlines()
        assert (code, out) == (2, "")
        assert first.startswith(f"Error: {recipe}:5: recipes.sum.merge_method: unknown merge method 'task_arithmetics'")
        assert second == (
            f"{recipe}:5: recipes.sum.adapters[1].adapter: no registered adapter or recipe 'c' (known: a, b)"
        )


def test_wrong_input(run: Run, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[tuple[Any, ...], str]] = [
        (
            ("merge", recipe, "summ", "-o", out),
            f"{recipe}: no recipe or adapter 'summ', did you mean 'sum'? (known: sum, best, a, b)",
        ),
        (("merge", recipe, "-o", recipe), f"{recipe}: is not a folder; choose another --output"),
        (
            ("inspect", tmp_path / "x"),
            f"adapter 'x': {tmp_path}/x is not a folder; give a PEFT folder with adapter_config.json",
        ),
        (("validate", tmp_path / "x.yaml"), f"{tmp_path}/x.yaml: there is no such file; check the path"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == (2, "", f"Error: {message}\n")
    code, _, err = run("merge", recipe, "-o", out, "--device", "abacus")
    assert (code, err.startswith("Error: --device abacus: cannot be used here: ")) == (2, True)
    recipe.write_text(RECIPE.replace("aliases:", "  two: {merge_method: linear, adapters: [{adapter: a}]}\naliases:"))
    assert run("plan", recipe)[2] == f"Error: {recipe}: has 2 recipes (sum, two); say which one, by its NAME\n"


def test_usage_errors(run: Run, recipe: Path) -> None:
    for arguments in (("nothing",), ("merge",), ("merge", recipe), ("plan", recipe, "--max-rank", "0")):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Usage: vllm-merge" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Examples:\n    vllm-merge {command}" in out


def test_validate(run: Run, recipe: Path) -> None:
    assert run("validate", recipe) == (0, f"{recipe}: valid: 2 adapters, 1 recipe, 1 alias\n", "")
    facts = json.loads(run("validate", recipe, "--json")[1])
    assert facts["valid"] is True
    assert facts["recipes"] == {"sum": "task_arithmetic"}


def test_plan_text_and_warnings(run: Run, recipe: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "c", factors(3, 1), base_model="org/another")
    text = (
        RECIPE.replace("./b", "./c")
        .replace("base_model: org/base\n", "")
        .replace("{adapter: b}]", "{adapter: b}, {adapter: b}]")
    )
    recipe.write_text(text.replace("adapters: [", "rank: lossless, adapters: ["))
    code, out, err = run("plan", recipe, "--max-rank", "2")
    assert code == 0
    assert err.splitlines() == [
        "Warning: the adapters name different base models, and only adapters of one base can be merged "
        "(org/base: a; org/another: b)",
        "Warning: recipe 'sum' lists the adapter 'b' more than once",
        "Warning: the file names no base_model, so the digest does not cover one",
        "Warning: the result has rank 3, and a server with --max-lora-rank 2 refuses it",
    ]
    found = [line.split() for line in out.splitlines()]
    assert ["rank", "3,", "2", "modules"] in found
    assert ["size", "264", "B", "in", "float32"] in found
    assert ["sum", "task_arithmetic", "core", "lossless", "4", "a,", "b,", "b"] in found
    assert "\x1b" not in out + err  # no colours where it is not a terminal


def test_methods(run: Run) -> None:
    _, out, _ = run("methods", "--json")
    assert {"linear", "task_arithmetic", "ties"} <= {method["name"] for method in json.loads(out)}
    facts = json.loads(run("methods", "ties", "--json")[1])
    assert {"name": "weight", "per_adapter": True, "default": 1.0}.items() <= facts["parameters"][0].items()
    code, out, _ = run("methods", "ties")
    assert (code, out.splitlines()[0]) == (0, "ties (version 1)")
    assert run("methods", "tise")[0] == 2


def test_inspect(run: Run, recipe: Path, tmp_path: Path) -> None:
    code, out, _ = run("inspect", tmp_path / "a", "--json")
    facts = json.loads(out)
    norms = {module: float(pair.delta().norm()) for module, pair in factors(1, 2).items()}
    assert code == 0
    assert {module: row["norm"] for module, row in facts["modules"].items()} == pytest.approx(norms, rel=1e-5)
    assert facts["norm"] == pytest.approx(sum(norm**2 for norm in norms.values()) ** 0.5, rel=1e-5)
    assert "report" not in facts

    run("merge", recipe, "-o", tmp_path / "out", "--max-rank", "2")
    facts = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert facts["report"]["method"] == "task_arithmetic"
    assert facts["provenance"]["plan"]["name"] == "sum"
    _, out, _ = run("inspect", tmp_path / "out")
    row = next(line for line in out.splitlines() if line.startswith("model.layers.0.q_proj")).split()
    assert row[1:5] == ["5", "6", "2", "1"]
    assert row[6].endswith("%")


def test_schema_is_current_and_right(run: Run, recipe: Path) -> None:
    _, out, _ = run("schema")
    assert out == SCHEMA.read_text(), "run `vllm-merge schema > configs/recipe.schema.json`"
    schema = json.loads(out)
    draft = pytest.importorskip("jsonschema").Draft202012Validator
    draft.check_schema(schema)
    validator = draft(schema)
    good = yaml.safe_load(RECIPE)
    assert list(validator.iter_errors(good)) == []
    for wrong in (
        RECIPE.replace("task_arithmetic", "nothing"),
        RECIPE.replace("weight", "wait"),
        RECIPE.replace("version: 1", "version: 2"),
        RECIPE.replace("adapters: [", "rank: 0, adapters: ["),
        RECIPE.replace("adapters: [", "space: nowhere, adapters: ["),
        RECIPE.replace("best:", "be st:"),
        RECIPE + "more: 1\n",
    ):
        assert list(validator.iter_errors(yaml.safe_load(wrong))), wrong


def test_as_a_process(recipe: Path) -> None:
    """The exit code and streams of a real process, without a terminal."""
    command = [sys.executable, "-c", "from vllm_merge.cli.app import main; main()"]
    right = subprocess.run([*command, "validate", recipe], capture_output=True, text=True, check=False)
    assert (right.returncode, right.stderr) == (0, "")
    wrong = subprocess.run([*command, "validate", "nothing.yaml"], capture_output=True, text=True, check=False)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "Error: nothing.yaml: there is no such file; check the path\n"


def test_starting_is_quick() -> None:
    """Help needs neither torch nor pydantic; a shell that completes asks for it at every key."""
    code = (
        "import sys\nfrom vllm_merge.cli.app import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pydantic', 'vllm', 'transformers', 'numpy', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_completion_of_commands() -> None:
    words = {"_VLLM_MERGE_COMPLETE": "complete_bash", "COMP_WORDS": "vllm-merge pl", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from vllm_merge.cli.app import main; main()"]
    done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["plan"]


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "vllm-merge")


def test_serve_says_what_is_wrong_before_vllm_starts(run: Run, recipe: Path, tmp_path: Path) -> None:
    base = tmp_path / "model"
    base.mkdir()
    (base / "config.json").write_text('{"vocab_size": 9}')
    save_file({"model.layers.0.q_proj.weight": torch.zeros(7, 6)}, base / "model.safetensors")
    cases = [
        (
            ("serve", "--port", "1", base, "--config", recipe),
            "serve --port: the model comes first, then --config FILE and vLLM's options",
        ),
        (
            ("serve", base, "--config", tmp_path / "none.yaml", "--port", "1"),
            f"{tmp_path}/none.yaml: there is no such file; check the path",
        ),
        (
            ("serve", base, "--config", recipe),
            f"adapter 'a' does not fit the base model: model.layers.0.q_proj maps 6 to 5 features and that of {base} "
            "maps 6 to 7; the adapter was trained on another base model\n"
            f"adapter 'b' does not fit the base model: model.layers.0.q_proj maps 6 to 5 features and that of {base} "
            "maps 6 to 7; the adapter was trained on another base model",
        ),
    ]
    for arguments, message in cases:
        assert run(*arguments) == (2, "", f"Error: {message}\n")
    (tmp_path / "a/adapter_model.safetensors").unlink()
    (tmp_path / "b/adapter_config.json").write_text("{")
    code, _, err = run("serve", base, "--config", recipe)
    assert code == 2
    first, second = err.splitlines()
    assert first.startswith(f"Error: {recipe}:3: adapters.a.path: adapter 'a': ")
    assert second.startswith(f"{recipe}:3: adapters.b.path: adapter 'b': ")


def test_serve_needs_a_plugin_that_vllm_finds(run: Run, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    """As where the package lies on Python's path and is not installed: vLLM would serve the base model alone."""
    monkeypatch.setattr("vllm_merge.serving.diagnosis.entry_points", lambda group: [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("vllm_merge.cli.serve.wanted_rank", lambda model, config: 8)
    code, out, err = run("serve", "org/base", "--config", recipe)
    assert (code, out) == (1, "")
    assert err.startswith(
        "Error: vLLM would not find the plugin: it is not among vllm.general_plugins and vllm.endpoint_plugins; "
    )
    assert "pip install" in err


def test_a_base_model_that_is_not_there(run: Run, recipe: Path, tmp_path: Path) -> None:
    """Nothing is made, served or asked of another; what may be a model of the Hub is not looked for."""
    recipe.write_text(RECIPE.replace("base_model: org/base", "base_model: ./modl"))
    told = f"there is no {tmp_path}/modl; give the folder of the base model, or its Hub name"
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"task": "t", "prompt": "p", "answer": "a"}\n')
    for command in (("plan", recipe), ("merge", recipe, "-o", tmp_path / "out"), ("eval", recipe, "--data", tasks)):
        assert run(*command) == (2, "", f"Error: {recipe}:2: base_model: {told}\n")
    for command in (
        ("serve", tmp_path / "modl", "--config", recipe),
        ("serve", f"{tmp_path}/modl/", "--config", recipe),
    ):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert err.startswith(f"Error: MODEL: there is no {tmp_path}/modl")
    model = ("--model", tmp_path / "other")
    told = f"there is no {tmp_path}/other; give the folder of the base model, or its Hub name"
    assert run("eval", recipe, "--data", tasks, *model) == (2, "", f"Error: --model: {told}\n")
    assert not (tmp_path / "out").exists()


def test_what_the_system_refuses_is_no_traceback(run: Run, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/out")

    monkeypatch.setattr("vllm_merge.cli.merge._write", full)
    assert run("merge", recipe, "-o", recipe.parent / "out") == (1, "", "Error: /out: No space left on device\n")


def test_colours_on_terminals_only(recipe: Path, tmp_path: Path) -> None:
    """The same command on a pseudo-terminal has colours, and none where NO_COLOR asks for that."""
    command = [
        sys.executable,
        "-c",
        "from vllm_merge.cli.app import main; main()",
        "validate",
        str(tmp_path / "no.yaml"),
    ]

    def on_terminal(**environment: str) -> bytes:
        ours, theirs = pty.openpty()
        keep = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
        subprocess.run(command, stderr=theirs, stdout=theirs, env={**keep, "TERM": "xterm", **environment}, check=False)
        os.close(theirs)
        return os.read(ours, 10_000)

    assert b"\x1b[" in on_terminal()
    assert b"\x1b[31" not in on_terminal(NO_COLOR="1")
    assert b"\x1b[1;31" not in on_terminal(NO_COLOR="1")


def test_completion_of_recipe_names(recipe: Path) -> None:
    command = [sys.executable, "-c", "from vllm_merge.cli.app import main; main()"]
    for file, start, expected in ((recipe, "", ["sum", "best", "a", "b"]), (recipe, "s", ["sum"]), ("no.yaml", "", [])):
        words = {
            "_VLLM_MERGE_COMPLETE": "complete_bash",
            "COMP_WORDS": f"vllm-merge plan {file} {start}",
            "COMP_CWORD": "3",
        }
        done = subprocess.run(command, env=os.environ | words, capture_output=True, text=True, check=False)
        assert done.stdout.split() == expected
