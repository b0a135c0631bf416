# SPDX-License-Identifier: Apache-2.0
"""What the quality benchmark asks a server, and what it learns, in miniature."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.quality import grid, learned, records, report, served
from benchmarks.quality.bank import Wanted, train_bank
from benchmarks.quality.prepare import asked, few_shot, questions
from benchmarks.quality.scores import Scores
from benchmarks.quality.scoring import Weights
from benchmarks.quality.sweep import Sweep
from benchmarks.quality.tasks import Words, answer
from tests.benchmarks.quality_miniature import SETTINGS, Done
from vllm_merge.cli.files import planned
from vllm_merge.cli.output import progress_bar
from vllm_merge.plan_runner import run_plan


class Listening:
    """A tokenizer that remembers what it read."""

    def __init__(self, own: Any) -> None:
        self._own, self.heard = own, list[str]()

    def __call__(self, texts: Any, **options: Any) -> Any:
        self.heard += [texts] if isinstance(texts, str) else texts
        return self._own(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def test_training_scoring_serving_and_learning_ask_in_the_same_words(done: Done) -> None:
    """A task's own, wherever it is asked."""
    for name, words in (("kinds", Words()), ("moves", Words("Go?", "Move:")), ("places", Words("", "Place:"))):
        task = replace(done.bench.tasks[name], words=words)
        one = replace(task, train=task.test[:20], valid=task.test[:20], test=task.test[:20])
        expected = {task.words.prompt(example.text) for example in one.test}
        assert len(expected) > 15

        bench = replace(done.bench, tasks={name: one})
        training, scoring, serving = (replace(bench, tokenizer=Listening(bench.tokenizer)) for _ in range(3))
        train_bank(training.model, training.tokenizer, [Wanted(one, 0, 2, 4)], replace(SETTINGS.tuning, steps=1))
        questions(scoring, [asked(scoring, name, "test")])
        served.right_answers(Likelihoods(serving.model), serving.tokenizer, "x", one, 20)
        labels = {answer(label) for label in task.labels}
        for where in (training, scoring, serving):
            assert set(where.tokenizer.heard) - labels == expected
        lines = learned.prompt_lines(bench, [name], False).splitlines()
        assert {json.loads(line)["prompt"] for line in lines} <= expected
        assert len(lines) == SETTINGS.validation
        room = replace(SETTINGS, base=replace(SETTINGS.base, context=200))
        shots, prefix = few_shot(replace(bench, settings=room), task)
        assert prefix.count(f"\n{words.question} ") == shots > 1
        assert prefix.startswith(words.instruction)
    assert [done.bench.tasks[name].words for name in ("noise", "places")] == [Words("a", "odd:"), Words()]


def test_a_served_recipe_is_the_merge_that_was_measured(done: Done, tmp_path: Path) -> None:
    """The same ΔW, λ and density included; only such recipes are served whose results a server takes."""
    scores = Scores(done.rows, done.bench.counted())
    best = served.best_recipes(scores, 0, 9, 12, 12)
    assert {(one.row["method"], one.row["rank"]) for one in best} >= {
        ("ties", 4),
        ("ctm", 4),
        ("task_arithmetic", "lossless"),
    }
    assert not any(one.row["space"] == "delta" and one.row["rank"] == "lossless" for one in best)
    assert all(one.row["rank"] == 4 for one in served.best_recipes(scores, 0, 9, 4, 12))
    tasks = [done.bench.tasks[name] for name in scores.tasks]
    (tmp_path / "recipes.yaml").write_text(served.recipe_file(done.places.weights, best, tasks))
    sweep = Sweep(done.bench)
    for one in [one for one in best if one.row["method"] in ("ties", "ctm")]:
        with progress_bar("plan") as bar:
            plan = planned(tmp_path / "recipes.yaml", one.name, "float32", 12, bar).plan
        found = run_plan(plan, report="brief")
        config = grid.Config(
            **{name: one.row[name] for name in ("set", "seed", "method", "space", "rank")},
            tasks=tuple(one.row["tasks"]),
        )
        measured = sweep._merge(config, one.row["density"])
        assert found.factors.keys() == measured.factors.keys()
        for module in found.factors:
            expected = one.row["lambda"] * measured.delta(module)
            assert torch.allclose(found.delta(module), expected, atol=1e-4 * float(expected.abs().max()))


class Likelihoods:
    """An OpenAI client whose server is the offline model with a merge's weights; token ids in, log p of each out."""

    def __init__(self, model: Any) -> None:
        self.model, self.completions = model, self

    def create(self, *, prompt: list[list[int]], **options: Any) -> Any:
        assert options["max_tokens"] == 1
        choices = []
        for index, ids in enumerate(prompt):
            with torch.no_grad():
                each = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            found = [None, *(float(each[place, token]) for place, token in enumerate(ids[1:])), -1.0]
            values, tokens = each[-1].topk(options["logprobs"])
            top = {f"token_id:{token}": value for token, value in zip(tokens.tolist(), values.tolist(), strict=True)}
            told = SimpleNamespace(token_logprobs=found if options.get("echo") else found[-1:], top_logprobs=[top])
            choices.append(SimpleNamespace(index=index, logprobs=told))
        return SimpleNamespace(choices=choices[::-1])


def test_what_is_served_is_compared_with_what_was_recorded(done: Done) -> None:
    scores = Scores(done.rows, done.bench.counted())
    one = next(one for one in served.best_recipes(scores, 0, 1, 12, 12) if one.row["rank"] == "lossless")
    sweep = Sweep(done.bench)
    config = grid.Config(
        **{n: one.row[n] for n in ("set", "seed", "method", "space", "rank")}, tasks=tuple(one.row["tasks"])
    )
    merged = sweep._merge(config, one.row["density"])
    weights = Weights(done.bench.model)
    weights.set({module: merged.delta(module) for module in merged.factors}, one.row["lambda"])
    client = Likelihoods(done.bench.model)
    ask = lambda task: served.right_answers(client, done.bench.tokenizer, one.name, done.bench.tasks[task], 20)
    found = {task: ask(task) for task in one.row["tasks"]}
    weights.set({})
    row = served.compare(one, found)
    assert (row["examples"], row["within_noise"], row["agreement"]) == (60, True, 1.0)
    assert row["difference"] == 0
    assert (
        row["low"] == -row["high"] == pytest.approx(-1.96 / 60, abs=1e-4)
    )  # none of 60 differs: that is not certainty
    assert row["served"] == row["offline"]
    assert served.compare(one, {task: ~bits for task, bits in found.items()})["agreement"] == 0
    wrong = {task: np.zeros_like(bits) for task, bits in found.items()}
    worse = served.compare(one, wrong)
    assert worse["within_noise"] is (row["offline"] == 0)
    assert worse["low"] <= worse["difference"] == -row["offline"] <= worse["high"]


def test_learned_merges_stand_beside_the_others(done: Done, tmp_path: Path) -> None:
    """From the prompt to the page; what the recipe gives is what is scored, and nothing is learned twice."""
    shutil.copytree(done.places.results, tmp_path / "results")
    places = replace(done.places, results=tmp_path / "results")
    tasks = done.bench.counted()
    ways = ("ssr", "adamerging", "adamerging++", "lorahub")
    everything = learned.wanted(done.rows, tasks, (0,), ways)
    assert learned.learn(places, everything, 600, "rows-learned") == 4
    rows = [row for row in records.read_rows(places.results) if row["kind"] == "learned"]
    assert {(row["method"], row["rank"]) for row in rows} == {(way, rank) for way in ways for rank in ("lossless", 4)}
    for row in rows:
        assert row["labels"] == (row["method"] == "lorahub")
        assert row["seconds"] > 0
        assert row["run"]["best"] <= row["run"]["start"]
        assert row["weights"] == done.merges(stage="all tasks")[0]["weights"]
        assert all(len(records.unpacked(bits)) == 60 for bits in row["bits"].values())
        assert 0.5 <= row["lambda"] <= 2
    lossless = {row["method"]: row["validation"] for row in rows if row["rank"] == "lossless"}
    [start] = done.merges(method="task_arithmetic", rank="lossless", stage="all tasks")
    assert lossless["ssr"] >= start["validation"] - 0.1
    prompts = (done.places.weights / "learned" / "0" / "ssr" / "prompts.jsonl").read_text().splitlines()
    assert len(prompts) == 3 * SETTINGS.validation
    assert all("answer" not in json.loads(line) for line in prompts)
    page = tmp_path / "evidence.md"
    summary = report.write_report(places.results, page)
    assert "| adamerging | lossless | for λ | " in page.read_text()
    verdicts = {claim["text"]: claim["verdict"] for claim in summary["claims"]}
    assert verdicts["3 tasks: the best learned merge reaches 85 % lossless"] in ("held", "failed")
    assert {family["method"] for family in summary["families"] if family["space"] == "learned"} == set(ways)
    other = replace(everything[0], start={**everything[0].start, "weights": "of another run"})
    assert learned.learn(places, [other], 600, "rows-learned") == 0
    with pytest.raises(SystemExit, match="not measured"):
        learned.wanted(done.rows, tasks, (1,), ("ssr",))


def test_the_start_of_adamerging_with_ties_is_as_large_as_what_was_measured(done: Done) -> None:
    [one] = learned.wanted(done.rows, done.bench.counted(), (0,), ("adamerging++",))
    folder = done.places.weights / "start"
    folder.mkdir()
    (folder / "start.yaml").write_text(learned.start_file(done.bench, one))
    merged = run_plan(learned.plan_of(folder / "start.yaml", "start"), report="brief")
    sweep = Sweep(done.bench)
    config = grid.Config(
        **{n: one.start[n] for n in ("set", "seed", "method", "space", "rank")}, tasks=tuple(one.start["tasks"])
    )
    measured = sweep._merge(config, one.start["density"])
    sizes = [sum(float(m.delta(name).square().sum()) for name in m.factors) ** 0.5 for m in (merged, measured)]
    assert sizes[0] == pytest.approx(one.start["lambda"] * sizes[1], rel=1e-3)
