# SPDX-License-Identifier: Apache-2.0
"""`vllm-merge search` from its options to what it writes and promotes, on a played server; and once on a real one."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from tests.conftest import DEMO
from tests.search.played import TOKEN
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.loading import load_recipes
from vllm_merge.search.halving import Halving


@pytest.fixture
def search(run, merges, data):
    def execute(*arguments, examples=True):
        return run("search", "--server", merges.url, *(("--data", data) if examples else ()), *arguments)

    return execute


def test_it_finds_writes_and_promotes_the_best(search, merges, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_MERGE_ADMIN_TOKEN", TOKEN)
    out = tmp_path / "found.yaml"
    arguments = ("--methods", "ties", "--candidates", 12, "--parameter", "size=0.3..3", "--parameter", "weight=1")
    code, printed, err = search(*arguments, "-o", out, "--promote", "assistant", "--name", "mine", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    best = facts["best"]["recipe"]
    product = 0.5 * best["parameters"]["lambda"] * best["parameters"].get("density", 0.2) * 5
    assert product == pytest.approx(1, abs=0.35), "λ and density are where the played server answers best"
    assert facts["best"]["estimates"]["mean"]["count"] == 60
    assert facts["best"]["estimates"]["mean"]["mean"] > facts["against"]["mean"]["mean"]
    assert facts["requests"] == len(merges.asked)
    recipes = load_recipes(out, default_registry(), registered=("sql", "code", "chat"))
    assert recipes.recipes["mine"].parameters == best["parameters"]
    assert out.read_text().startswith("# Found by `vllm-merge search`")
    (added, body), (moved, target) = merges.admin
    assert (added, moved) == ("/merge/recipes/mine", "/merge/aliases/assistant")
    assert body["merge"]["parameters"] == best["parameters"]
    assert target == {"target": "mine"}
    assert facts["promoted"]["artifact"] == "found@0123456789ab"


def test_what_is_no_better_is_not_promoted(search, merges, monkeypatch):
    monkeypatch.setenv("VLLM_MERGE_ADMIN_TOKEN", TOKEN)
    arguments = ("--methods", "ties", "--candidates", 2, "--parameter", "lambda=30", "--promote", "assistant")
    code, printed, err = search(*arguments)
    assert code == 1
    assert "alias 'assistant' stays as it is" in err
    assert "compared with: " in printed
    assert not merges.admin


def test_a_recipe_that_is_served_already_is_not_added_again(search, merges, monkeypatch):
    monkeypatch.setenv("VLLM_MERGE_ADMIN_TOKEN", TOKEN)
    arguments = ("--methods", "ties", "--candidates", 2, "--promote", "assistant", "--limit", 6)
    for _ in range(2):
        assert search(*arguments)[0] == 0
    assert [path.split("/")[2] for path, _ in merges.admin] == ["recipes", "aliases", "aliases"]


def test_a_search_that_ended_early_promotes_nothing(search, merges, monkeypatch):
    monkeypatch.setenv("VLLM_MERGE_ADMIN_TOKEN", TOKEN)
    arguments = ("--methods", "ties", "--candidates", 6, "--promote", "assistant", "--minutes", 1)
    finished, take = [], Halving._take

    def taken(self, *arguments):
        take(self, *arguments)
        finished.append(arguments)

    monkeypatch.setattr(Halving, "_take", taken)
    # The minute is over once a candidate has finished a rung, whichever is the first.
    monkeypatch.setattr("vllm_merge.search.budget.Budget.seconds", property(lambda budget: 61.0 if finished else 0.0))
    code, _, err = search(*arguments)
    assert code == 1
    assert "alias 'assistant' stays as it is: 1 minutes are over" in err
    assert not merges.admin


def test_people_get_a_table(search):
    code, printed, err = search("--auto", "--candidates", 6, "--limit", 6, "--requests", 120)
    assert (code, err) == (0, "")
    assert "6 candidates; " in printed
    assert "settings" in printed
    assert "merge:" in printed


@pytest.mark.parametrize(("rate", "said"), [(3, True), (30, False)])
def test_a_server_that_limits_new_merges_is_said_to_slow_the_search(search, merges, rate, said):
    merges.limits["rate"] = rate
    code, printed, err = search("--methods", "ties", "--candidates", 3)
    assert code == 0
    assert ("3 merges of requests a minute" in " ".join((printed + err).split())) == said
    assert ("VLLM_MERGE_ADHOC=rate=12" in "".join((printed + err).split())) == said


@pytest.mark.parametrize(
    "more", [("--metric", "logprob"), ("--metric", "regex", "--pattern", "(right|wrong)"), ("--chat",)]
)
def test_other_metrics(search, more):
    code, printed, _ = search("--methods", "ties", "--candidates", 4, "--limit", 4, *more, "--json")
    assert code == 0
    mean = json.loads(printed)["best"]["estimates"]["mean"]
    assert mean["count"] == 8
    assert (mean["mean"] < 0) == ("logprob" in more)


def test_a_judge(search, merges):
    code, printed, _ = search(
        *("--methods", "ties", "--candidates", 4, "--limit", 4, "--metric", "judge", "--json"),
        *("--judge", merges.url, "--judge-model", "judge"),
    )
    assert code == 0
    assert 0 < json.loads(printed)["best"]["estimates"]["mean"]["mean"] <= 0.75
    assert json.loads(printed)["requests"] == len(merges.asked), "the judge's count too"


def test_candidates_that_the_server_cannot_make_are_dropped_with_its_reason(search, merges):
    merges.refuse = lambda model, n: (400, None) if "density" in model else None
    code, printed, _ = search("--methods", "ties", "--candidates", 4, "--limit", 4, "--json")
    facts = json.loads(printed)
    assert code == 0
    failed = [row for row in facts["candidates"] if row["failed"]]
    assert len(failed) == 3
    assert "400: refused merge:ties" in failed[0]["failed"]
    merges.refuse = lambda model, n: (500, None)
    code, _, err = search("--methods", "ties", "--candidates", 4)
    assert code == 1
    assert "every candidate failed; the first: " in err


def test_it_goes_on_from_its_log(search, merges, tmp_path):
    arguments = ("--methods", "ties", "--candidates", 9, "--log", tmp_path / "log", "--json")
    code, printed, _ = search(*arguments, "--requests", 160)
    first = json.loads(printed)
    assert code == 0
    code, printed, _ = search(*arguments, "--resume")
    second = json.loads(printed)
    assert code == 0
    asked = len(merges.asked)
    code, printed, _ = search(*arguments, "--resume")
    assert code == 0
    assert len(merges.asked) == asked
    assert json.loads(printed)["best"] == second["best"]
    assert [c["recipe"] for c in sorted(first["candidates"], key=lambda c: c["number"])] == [
        c["recipe"] for c in sorted(second["candidates"], key=lambda c: c["number"])
    ]
    code, _, err = search(*arguments, "--resume", "--seed", 7)
    assert code == 2
    assert "is of another search: seed (it was 0, now 7)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--promote", "assistant"), "set VLLM_MERGE_ADMIN_TOKEN"),
        (("--resume",), "give --log FILE"),
        (("--adapters", "sql,cod"), "did you mean 'code'"),
        (("--adapters", "sql,broken"), "'broken' cannot be merged: cannot be read"),
        (("--adapters", "sql"), "needs two adapters"),
        (("--methods", "tiess"), "did you mean 'ties'"),
        (("--spaces", "dense"), "'dense' is none"),
        (("--rank", "0"), "'0' is no rank"),
        (("--parameter", "size=1", "--parameter", "lambda=1"), "give size or lambda"),
        (("--pattern", "x"), "goes with --metric regex"),
        (("--metric", "regex", "--pattern", "("), "is not a regular expression"),
        (("--metric", "judge"), "give --judge URL and --judge-model NAME"),
        (("--metric", "logprob", "--chat"), "has no place"),
        (("--lm-eval", "arc_easy"), "one of the two"),
        (("--requests", "20"), "give more --requests or at most"),
        (("--name", "a/b"), "is not a name"),
        (("-o", "/"), "is a folder"),
    ],
)
def test_wrong_options_say_what_is_right(search, merges, arguments, message, monkeypatch):
    monkeypatch.delenv("VLLM_MERGE_ADMIN_TOKEN", raising=False)
    code, out, err = search(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not merges.asked


def test_a_file_of_somebody_else_is_not_written_over(search, tmp_path):
    (tmp_path / "recipes.yaml").write_text("version: 1\n")
    code, _, err = search("-o", tmp_path / "recipes.yaml")
    assert code == 2
    assert "not from a search" in err


def test_a_server_that_merges_for_nobody_is_named(search, merges):
    merges.limits = None
    code, _, err = search()
    assert code == 2
    assert "VLLM_MERGE_ADHOC=on" in err


def test_the_harness_is_optional(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = search("--lm-eval", "arc_easy", examples=False)
    assert code == 2
    assert "pip install 'lm-eval" in err


def test_ctrl_c_keeps_the_best_so_far(merges, data, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    def refuse(model, n):
        if len(merges.asked) > 150:  # somewhere in the second rung
            reached.set()
            go_on.wait(120)

    merges.refuse = refuse
    command = [
        sys.executable,
        "-m",
        "vllm_merge",
        "search",
        "--server",
        merges.url,
        "--data",
        data,
        "--methods",
        "ties",
    ]
    options = ["--candidates", "27", "--at-once", "2", "-o", tmp_path / "found.yaml", "--log", tmp_path / "log"]
    process = subprocess.Popen(
        [str(part) for part in command + options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reached.wait(120), process.poll()
    process.send_signal(signal.SIGINT)
    go_on.set()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    if "ended early: it was stopped" not in out:  # it was quicker than the signal
        assert "27 candidates" in out
    assert (tmp_path / "found.yaml").is_file()


def test_a_few_candidates_on_a_real_server(demo_server, run, tmp_path):
    examples = [json.loads(line) for line in (DEMO / "validation.jsonl").read_text().splitlines()]
    few = [row for row in examples if row["task"] in ("upper", "double")]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in few))
    out = tmp_path / "found.yaml"
    code, printed, err = run(
        *("search", "--server", demo_server.url, "--data", tmp_path / "few.jsonl", "--adapters", "upper,double"),
        *(
            "--methods",
            "wudi,task_arithmetic",
            "--candidates",
            4,
            "--limit",
            6,
            "--max-tokens",
            12,
            "-o",
            out,
            "--json",
        ),
    )
    assert (code, err) == (0, "")
    facts = json.loads(printed)
    assert not any(row["failed"] for row in facts["candidates"])
    assert facts["best"]["estimates"]["mean"]["mean"] > 0.7, "two tasks that do not disturb each other are kept"
    assert facts["best"]["estimates"]["mean"]["count"] == 12
    recipes = load_recipes(out, default_registry(), registered=("upper", "double"))
    assert list(recipes.recipes) == [facts["name"]]
    code, printed, err = run(
        *("search", "--server", demo_server.url, "--data", tmp_path / "few.jsonl", "--adapters", "upper,double"),
        *("--methods", "task_arithmetic", "--candidates", 2, "--limit", 2, "--metric", "logprob", "--json"),
    )
    assert (code, err) == (0, "")
    assert -3 < json.loads(printed)["best"]["estimates"]["mean"]["mean"] < 0
