# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness, with a harness that is played, and with the real one where it is installed: its model asks
through the search's own requests.
"""

import json
import sys
import types

import pytest

from tests.search.played import ANSWER
from vllm_merge.errors import UserInputError
from vllm_merge.search.budget import Budget
from vllm_merge.search.endpoint import Endpoint
from vllm_merge.search.harness import HarnessScorer

DOCUMENTS = {"choice": 5, "words": 3}
MODEL = "merge:ties(sql,code;lambda=2)"


@pytest.fixture
def harness(monkeypatch):
    """Two tasks: `choice` compares log likelihoods (less is better), `words` looks at what is generated."""
    calls = []

    def simple_evaluate(*, model, tasks, samples, task_manager, log_samples, bootstrap_iters, random_seed):
        assert log_samples
        calls.append(samples)
        found = {}
        for task in tasks:
            request = types.SimpleNamespace
            if task == "choice":
                asked = [request(args=(f"question {i}", ANSWER)) for i in samples[task]]
                values = [-total for total, likeliest in model.loglikelihood(asked) if isinstance(likeliest, bool)]
                name = "bits"
            else:
                wanted = {"until": ["\n\n", ""], "max_gen_toks": 7}
                asked = [request(args=(f"question {i}", wanted)) for i in samples[task]]
                values = [float(ANSWER in text) for text in model.generate_until(asked)]
                name = "exact_match"
            rows = [
                {"doc_id": i, "metrics": [name, "other"], name: v, "other": 9.0, "filter": "none"}
                for i, v in zip(samples[task], values, strict=True)
            ]
            found[task] = rows + [{**row, name: -100.0, "filter": "second"} for row in rows]
        better = {"choice": {"bits": False}, "words": {"exact_match": True}}
        return {"samples": found, "higher_is_better": {task: better[task] for task in tasks}}

    class TaskManager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def load(self, names):
            made = {n: types.SimpleNamespace(eval_docs=range(DOCUMENTS[n])) for n in names}
            return {"tasks": made, "groups": {}}

    modules = {
        "lm_eval": types.SimpleNamespace(simple_evaluate=simple_evaluate),
        "lm_eval.tasks": types.SimpleNamespace(TaskManager=TaskManager),
        "lm_eval.api.model": types.SimpleNamespace(LM=object),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_documents_are_asked_in_turns_and_each_once(merges, harness):
    endpoint = Endpoint(merges.url, Budget(), 4)
    scorer = HarnessScorer(endpoint, ["choice", "words"], 4, 0, 4)
    assert sorted(scorer.tasks) == ["choice"] * 4 + ["words"] * 3
    assert set(scorer.tasks[:2]) == {"choice", "words"}
    first, rest = scorer.values_of(MODEL, 0, 2), scorer.values_of(MODEL, 2, 7)
    whole = scorer.values_of(MODEL, 0, 7)
    scorer.close()
    assert whole == first + rest
    for task, value in zip(scorer.tasks, whole, strict=True):
        assert value in ((-0.75, -6.0) if task == "choice" else (0.0, 1.0)), "less is better is turned round"
    assert not {(t, i) for t, d in harness[0].items() for i in d} & {(t, i) for t, d in harness[1].items() for i in d}
    generated = [body for body in merges.asked if not body.get("echo")]
    assert {(body["model"], body["max_tokens"], tuple(body["stop"])) for body in generated} == {(MODEL, 7, ("\n\n",))}
    assert endpoint._budget.requests == len(merges.asked) == 14


def test_a_task_that_is_none_is_said(merges, harness):
    with pytest.raises(UserInputError, match="--lm-eval nothing: KeyError"):
        HarnessScorer(Endpoint(merges.url, Budget(), 4), ["nothing"], 4, 0, 4)


def test_the_command_searches_on_it(run, merges, harness):
    code, printed, err = run(
        *("search", "--server", merges.url, "--lm-eval", "words,choice", "--methods", "ties", "--candidates", 4)
    )
    assert (code, err) == (0, "")
    assert "lm-eval" in printed


def test_the_real_harness_reads_tasks_asks_and_scores(run, merges, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"asked": f"question {i}", "words": [ANSWER, "nothing"], "gold": 0} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test", "doc_to_text": "{{asked}}"}
    word = [{"function": "regex", "regex_pattern": "(right|wrong)"}, {"function": "take_first"}]
    said = {
        "doc_to_target": "{{words[0]}}",
        "generation_kwargs": {"until": ["@"], "max_gen_toks": 7},
        "filter_list": [{"name": "word", "filter": word}],
    }
    chosen = {"doc_to_target": "gold", "doc_to_choice": "{{words}}"}
    kinds = (("generate_until", "exact_match", said), ("multiple_choice", "acc", chosen))
    for kind, metric, own in kinds:
        task = {"task": f"own_{metric}", "output_type": kind, "metric_list": [{"metric": metric}], **common, **own}
        (tmp_path / f"{metric}.yaml").write_text(json.dumps(task))
    tasks = ("--lm-eval", "own_exact_match,own_acc", "--lm-eval-tasks", tmp_path, "--limit", 6)
    recipes = ("--methods", "ties", "--parameter", "lambda=2", "--candidates", 2)
    code, printed, _ = run("search", "--server", merges.url, *tasks, *recipes, "--json")
    assert code == 0
    found = json.loads(printed)["best"]["estimates"]["tasks"]
    assert {name: task["count"] for name, task in found.items()} == {"own_exact_match": 6, "own_acc": 6}
    assert found["own_exact_match"]["mean"] > 0.5, "the first of these recipes is right most of the time"
    generated = {tuple(body["stop"]) for body in merges.asked if body.get("max_tokens") == 7}
    assert generated == {("@",)}
