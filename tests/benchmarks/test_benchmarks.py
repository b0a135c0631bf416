# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own arithmetic, and that merge_speed.py writes what calibrate.py reads."""

import argparse
import asyncio
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

SCHEMA = {"method", "space", "shape", "n", "r", "rank", "seconds", "peak_bytes", "floor_seconds"}
FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports one of the scripts by name, as they import one another."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def told_by_calibrate(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs calibrate.py with these arguments, in this process, and gives what it prints."""

    def act(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["calibrate.py", *arguments])
        script("calibrate").main()
        return capsys.readouterr().out

    return act


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_rows_are_written_fitted_and_checked(tmp_path: Path, told_by_calibrate: Any) -> None:
    out, constants = tmp_path / "speed.json", tmp_path / "calibration.json"
    point = ["--device", "cpu", "--shapes", "small:1,small:2,small:3,small:4,small:5", "--n", "2", "--r", "4"]
    run(
        "merge_speed.py",
        *point,
        "--methods",
        "linear,tsv_m",
        "--parts",
        "table",
        "--row-seconds",
        "0.3",
        "--out",
        str(out),
    )
    content = json.loads(out.read_text())
    assert content.keys() >= {"device", "torch", "date", "rows", "peers"}
    assert [(row["case"], row["shape"]) for row in content["rows"]][:3] == [
        ("linear", "small:1"),
        ("tsv_m", "small:1"),
        ("linear", "small:2"),
    ]
    for row in content["rows"]:
        assert row.keys() >= SCHEMA
        assert row["rank"] == 8
        assert 0 < row["floor_seconds"] < row["seconds"]
        # A weighted sum whose terms are put side by side holds nothing else.
        assert row["peak_bytes"] >= row["input_bytes"] + row["result_bytes"]
    assert (content["workspace_bound"], content["oversampling"]) == (2 << 30, 64)
    told = told_by_calibrate(str(out), "--out", str(constants))
    assert "of 10 rows within a factor 2" in told, "each of five points is foretold from four"
    assert "no forecast" not in told
    checked = told_by_calibrate("--check", str(out), "--out", str(constants))
    assert "as shipped" in checked
    assert "of 10 rows within a factor 2" in checked
    (entry,) = json.loads(constants.read_text())["devices"]
    assert entry["costs"].keys() == {"linear/core/whole", "tsv_m/core/whole"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--shapes", "9b"], "unknown shape '9b'"), (["--methods", "tiez"], "tiez"), (["--parts", "tabel"], "tabel")],
)
def test_what_is_not_known_is_said(arguments: list[str], word: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(FOLDER / "merge_speed.py"),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x"),
        *arguments,
    ]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    )
    assert result.returncode == 2
    assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_a_device_that_was_not_calibrated_is_skipped_and_said(tmp_path: Path, told_by_calibrate: Any) -> None:
    constants, out = tmp_path / "calibration.json", tmp_path / "speed.json"
    known = {"device": "Some GPU", "type": "cuda", "speed": {}, "costs": {}}
    constants.write_text(json.dumps({"devices": [known]}))
    facts = {"device": "CPU, 3 threads", "workspace_bound": 2 << 30, "oversampling": 64, "rows": []}
    out.write_text(json.dumps(facts))
    told = told_by_calibrate("--check", str(out), "--out", str(constants))
    assert told == "CPU, 3 threads: skipped, calibration.json knows Some GPU\n"


def test_parts_share_the_time_by_their_weights_and_leave_over_what_they_do_not_need(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = script("rates")
    now = [100.0]
    monkeypatch.setattr(rates.time, "monotonic", lambda: now[0])
    ends = rates.shares(60, [3, 2, 1])
    assert next(ends) == 130
    now[0] = 112.0  # it took 12 of its 30 seconds
    assert next(ends) == 112 + 48 * 2 / 3
    now[0] = 150.0  # and this one longer than it had
    assert next(ends) == 160


def test_constants_are_found_and_never_negative(script: Any) -> None:
    nonnegative = script("calibrate").nonnegative
    work = np.array([[1.0, 1, 5], [1, 2, 3], [1, 4, 1], [1, 8, 2], [1, 3, 9]])
    assert np.allclose(nonnegative(work, work @ [2.0, 3.0, 0.5]), [2, 3, 0.5], rtol=1e-3)
    assert (nonnegative(work, work @ [5.0, 1.0, -0.2]) >= 0).all()


def test_a_power_of_growth(script: Any) -> None:
    growth = script("growth")
    rows = [
        {
            "case": "c",
            "part": part,
            "shape": "8b",
            "n": n,
            "r": 16,
            "layers": 32,
            "seconds": n**2 / 1e3,
            "workspace_bytes": 7,
        }
        for part, n in [("growth", 4), ("table", 8), ("growth", 2), ("held_out", 6)]
    ]
    assert [row["n"] for row in growth.series(rows, "n")["c"]] == [2, 4, 8]
    assert growth.series(rows, "r") == {}
    (line,) = growth.exponents(rows)
    assert "power  2.00 of time,  0.00 of workspace" in line


def test_the_floor_of_a_weighted_sum_is_its_bytes(script: Any) -> None:
    cases, shapes = script("merge_cases"), script("shapes")
    shape = shapes.shape_of("8b")
    linear, knots = (next(case for case in cases.CASES if case.name == name) for name in ("linear", "knots_ties"))
    work = cases.Work.of(linear, shape, 8, 16, 128)
    sides = sum(rows + columns for _, rows, columns in shape.modules())
    assert (work.bytes, work.half, work.single) == (2 * 256 * sides, 0, 0)
    assert sides == 32 * 81920
    assert cases.Work.of(knots, shape, 8, 16, 128).single > 0


def test_a_stall_is_told_against_idle_and_against_requests_without_a_merge(script: Any) -> None:
    against = script("stall").against
    rows = [
        {"phase": phase, "p99": p99, "p999": p999, "max": most}
        for phase, p99, p999, most in [
            ("idle", 10, 12, 14),
            ("served_requests", 11, 15, 20),
            ("merge_linear", 11, 15, 24),
            ("vllm_load_r128", 12, 400, 614),
        ]
    ]
    found = against(rows, "idle")
    assert found["merge_linear"] == {"p99": 1.1, "p999": 1.25, "added": 10, "added_over_load": round(10 / 600, 3)}
    assert found["served_requests"] == {"p99": 1.1, "p999": 1.25, "added": 6}
    assert "added_over_load" not in found["vllm_load_r128"]
    beside = against(rows, "served_requests")
    assert beside.keys() == {"merge_linear", "vllm_load_r128"}
    assert beside["merge_linear"] == {"p99": 1, "p999": 1, "added": 4, "added_over_load": round(4 / 594, 3)}
    assert against(rows[:1], "served_requests") == {}


def test_first_tokens_are_told_as_medians_and_ratios_of_what_was_measured(script: Any) -> None:
    found = {
        "in_slot": [0.02, 0.01, 0.03],
        "in_cache": [0.03, 0.02, 0.9],
        "cold_linear": [0.3],
        **script("serving").own_loads([0.6]),
    }
    told = script("serving").first_tokens(found)
    assert told["in_slot"] == {"median": 0.02, "least": 0.01, "most": 0.03, "n": 3}
    assert {name: value for name, value in told.items() if "_over_" in name} == {
        "in_cache_over_in_slot": 1.5,
        "cold_linear_over_vllm_cold_load": 0.5,
    }


def test_throughput_is_told_against_what_ran_beside_it(script: Any) -> None:
    ratios = script("serving").throughput_ratios
    mean = {"plugin idle, plain rank 16": 100.0, "plugin idle, plain rank 128": 80.0, "plugin, merged rank 128": 76.0}
    assert ratios(mean) == {
        "plugin, merged rank 128 / plugin idle, plain rank 128": 0.95,
        "plugin idle, plain rank 128 / plugin idle, plain rank 16": 0.8,
    }
    beside = ratios(mean | {"vLLM alone, plain rank 128": 160.0})
    assert beside["plugin idle, plain rank 128 / vLLM alone, plain rank 128"] == 0.5
    assert beside["plugin, merged rank 128 / vLLM alone, plain rank 128"] == 0.475


def test_memory_that_grows_with_merges_is_told_by_its_slope(script: Any) -> None:
    growth = script("serving").growth
    done = list(range(0, 510, 10))
    samples = [{"resident": 9e9 * (merges < 100) + 2e6 * merges, "pinned": 4e9} for merges in done]
    told = growth(done, samples)
    assert told["from_merge"] == 100, "what happens before is the cache filling"
    assert told["mb_per_merge"] == {"resident": 2.0, "pinned": 0.0}
    assert growth([0, 10], [{"resident": 1.0}, {"resident": 5e6}])["from_merge"] == 2
    assert growth([0, 10], [{"resident": 1.0}, {"resident": 5e6}])["mb_per_merge"] == {"resident": None}


def test_quick_gives_way_to_what_is_said(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    live = script("live")
    monkeypatch.setattr(live.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["stall.py", "--quick", "--window", "9", "--", "--dtype", "float32"])
    parser = argparse.ArgumentParser()
    script("stall").window_arguments(parser)
    live.server_arguments(parser, port=1)
    options = live.parsed(parser)
    assert (options.shape, options.eager, options.window, options.acts) == ("small", True, 9.0, live.QUICK["acts"])
    assert options.server_options == ["--dtype", "float32"]


def test_no_two_prompts_share_a_block_that_vllm_would_have_cached(script: Any) -> None:
    """A request for a served artifact would otherwise compute less than one for an artifact that is new."""
    live = script("live")
    asked: list[str] = []

    class Session:
        def post(self, url: str, json: dict[str, Any]) -> Any:
            asked.append(json["prompt"])
            return Answer()

    class Answer:
        status = 200

        async def __aenter__(self) -> "Answer":
            return self

        async def __aexit__(self, *error: object) -> None: ...

        async def text(self) -> str:
            return ""

    client = live.Client(Session(), live.Server("http://x", None, Path("x"), "x"))

    async def ask() -> None:
        for _ in range(300):
            await client.first_token("m")

    asyncio.run(ask())
    assert {len(prompt) for prompt in asked} == {live.PROMPT}
    assert len({prompt[:16] for prompt in asked}) == 300
