# SPDX-License-Identifier: Apache-2.0
"""vllm-merge eval: tables, JSON, the floor, and what it refuses."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.evaluation.test_server import FakeServer, fake  # noqa: F401  the fixture
from vllm_merge.evaluation.server import Server

DEMO = Path(__file__).parents[2] / "examples/demo"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two tasks; a server that reverses its prompt gets one of them right."""
    file = tmp_path / "t.jsonl"
    lines = [{"task": "reverse", "prompt": f"p{i}", "answer": f"{i}p"} for i in range(4)]
    lines += [{"task": "same", "prompt": f"p{i}", "answer": f"p{i}"} for i in range(4)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.fixture
def served(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:  # noqa: F811
    names: dict[str, str | None] = {"base": None, "a": "base", "b": "base", "sum": "base"}
    monkeypatch.setattr(Server, "models", lambda self: names)
    return fake


def test_table(run: Run, recipe: Path, tasks: Path, served: FakeServer) -> None:
    code, out, err = run("eval", recipe, "--data", tasks, "--server", served.url)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["%", "right", "base", "model", "a", "b", "sum"]
    assert rows[1] == ["reverse", *["100", "(51–100)"] * 4]
    assert rows[2] == ["same", *["0", "(0–49)"] * 4]
    assert rows[3][:2] == ["mean", "50"]


def test_json_and_floor(run: Run, recipe: Path, tasks: Path, served: FakeServer) -> None:
    options = ("--data", tasks, "--server", served.url, "--limit", "2", "--json")
    code, out, err = run("eval", recipe, "best", *options, "--floor", "0.6")
    facts = json.loads(out)
    assert code == 1
    assert err == "Error: sum: the mean 50.0% is under the floor of 60.0%\n"
    assert facts["passed"] is False
    assert [(result["name"], result["kind"]) for result in facts["results"]] == [
        ("base", "base model"),
        ("a", "adapter"),
        ("b", "adapter"),
        ("sum", "recipe"),
    ]
    assert facts["results"][3]["tasks"]["reverse"] == {
        "accuracy": 1.0,
        "low": pytest.approx(0.342, abs=1e-3),
        "high": 1.0,
        "right": 2,
        "total": 2,
    }
    code, out, err = run("eval", recipe, "best", *options, "--floor", "0.5")
    assert (code, err, json.loads(out)["passed"]) == (0, "", True)


def test_refusals(run: Run, recipe: Path, tasks: Path, served: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = served.url
    cases: list[tuple[tuple[Any, ...], str]] = [
        (
            ("--server", url, "--model", "m"),
            "--server and --model: give one of the two; the server has its model already",
        ),
        (("nothing", "--server", url), f"{recipe}: no recipe or adapter 'nothing' (known: sum, best, a, b)"),
        (("--chat", "--model", DEMO / "adapters"), f"base model {DEMO}/adapters: transformers cannot load it: "),
    ]
    for arguments, message in cases:
        code, out, err = run("eval", recipe, "--data", tasks, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"Error: {message}")
    monkeypatch.setattr(Server, "models", lambda self: {"base": None, "a": "base"})
    assert run("eval", recipe, "--data", tasks, "--server", url) == (
        2,
        "",
        f"Error: --server {url}: does not serve b, sum (it serves base, a); start it with `vllm-merge serve MODEL "
        "--config` and this recipe file\n",
    )
    recipe.write_text(recipe.read_text().replace("base_model: org/base\n", ""))
    assert run("eval", recipe, "--data", tasks)[2] == (
        f"Error: {recipe}: names no base_model; give --model DIR, or --server URL\n"
    )
    tasks.write_text("{}\n")
    assert run("eval", recipe, "--data", tasks)[2].startswith(f"Error: {tasks}:1: 'task' is missing; a line is ")


def test_offline_with_the_demo(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "r.yaml"
    adapters = {name: {"path": str(DEMO / "adapters" / name)} for name in ("sort", "reverse")}
    items = [{"adapter": name} for name in adapters]
    recipes = {"both": {"merge_method": "task_arithmetic", "adapters": items}}
    content = {"version": 1, "base_model": str(DEMO / "model"), "adapters": adapters, "recipes": recipes}
    file.write_text(json.dumps(content))
    lines = (line for line in (DEMO / "eval.jsonl").read_text().splitlines() if json.loads(line)["task"] in adapters)
    tasks = tmp_path / "t.jsonl"
    tasks.write_text("\n".join(lines))
    options = ("--data", tasks, "--limit", "10", "--max-tokens", "20", "--json", "--floor", "0.5")
    code, out, err = run("eval", file, *options)
    assert (code, err) == (0, "")
    found = {result["name"]: result for result in json.loads(out)["results"]}
    assert list(found) == ["base model", "sort", "reverse", "both"]
    assert found["sort"]["tasks"]["sort"]["accuracy"] >= 0.9 > 0.5 > found["sort"]["tasks"]["reverse"]["accuracy"]
    assert found["base model"]["mean"]["accuracy"] < 0.3 < 0.5 <= found["both"]["mean"]["accuracy"]
