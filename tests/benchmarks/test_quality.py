# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark in miniature: made-up tasks, a model of two layers, and everything from the corpus to the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.quality import grid, records, report, served
from benchmarks.quality.bank import Wanted, train_bank
from benchmarks.quality.prepare import asked, questions
from benchmarks.quality.scores import Scores
from benchmarks.quality.scoring import Weights
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import OWN_WORDS, Words, answer, read_tasks
from tests.benchmarks.quality_miniature import METHODS, SETTINGS, STAGES, Done


def test_adapters_beat_the_base_and_noise_is_shut_out(done: Done) -> None:
    recorded = records.read_run(done.places.results)
    gate = recorded["gate"]
    assert gate["counted"] == ["kinds", "moves", "places"]
    for task in gate["counted"]:
        assert gate["tasks"][task]["single"] >= gate["tasks"][task]["base"] + 0.2
        assert gate["tasks"][task]["shots"] > 0
    assert not gate["tasks"]["noise"]["counts"]
    losses = recorded["base"]["losses"]
    assert losses[-1]["valid"] < losses[0]["valid"] < 5
    assert recorded["settings"]["seeds"] == [0]
    assert recorded["settings"]["words"] == {"noise": {"instruction": "a", "question": "odd:"}}
    assert recorded["settings"]["tuning"]["mixed"][1] == {"rank": 8, "alpha": 4, "speed": 0.5}
    assert recorded["device"].startswith("CPU")
    inputs = recorded["adapters osrm"]["inputs"]
    assert all(one["others"] < one["own"] for one in inputs.values())


def test_every_configuration_is_measured_once(done: Done) -> None:
    wanted = grid.plan(SETTINGS, ["kinds", "moves", "places"], METHODS, STAGES)
    assert sorted(records.key(config.row()) for config in wanted) == sorted(records.key(r) for r in done.merges())
    assert {(row["method"], row["space"]) for row in done.merges(stage="all tasks")} == {
        ("task_arithmetic", "core"),  # the same in all its spaces
        *(("ties", space) for space in ("delta", "knots", "core")),
        ("ctm", "core"),
    }
    for row in done.merges():
        assert "error" not in row
        assert len(row["weights"]) == 12
        assert row["device"].startswith("CPU")
        assert set(row["bits"]) == set(row["tasks"])
        assert all(len(records.unpacked(bits)) == 60 for bits in row["bits"].values())
        assert (row["density"] is None) == (row["method"] == "task_arithmetic")
        assert bool(row["report"]) == (row["stage"] == "pairs")
    assert len(done.merges(stage="pairs", set="plain")) == 3 * len([e for e in grid.PREDICTED if e[0] in METHODS])
    for row in done.merges(stage="all tasks", rank="lossless"):
        assert set(row["hits"]) == {"kinds", "moves", "places"}
        assert all(0 <= task["1"] <= task["3"] <= task["5"] <= 1 for task in row["hits"].values())


def test_merges_keep_some_of_their_adapters(done: Done) -> None:
    """A real effect: two adapters as one are above chance, which is where the base is."""
    scores = Scores(done.rows, ["kinds", "moves", "places"])
    found = [1 - scores.loss(row) for row in done.merges(stage="pairs")]
    assert max(found) > 0.25
    assert np.mean(found) > 0.05


def test_the_page_has_tables_and_verdicts(done: Done, tmp_path: Path) -> None:
    page = tmp_path / "evidence.md"
    page.write_text(f"by hand above\n{report.BEGIN}\nold\n{report.END}\nby hand below\n")
    summary = report.write_report(done.places.results, page)
    text = page.read_text()
    assert text.startswith("by hand above\n")
    assert text.endswith("by hand below\n")
    assert "old" not in text
    assert "| kinds | " in text
    assert "| ctm | core | " in text
    assert "## Not measured" in text
    verdicts = {claim["text"]: claim["verdict"] for claim in summary["claims"]}
    assert verdicts["KnOTS-TIES is above TIES"] in ("held", "failed", "undecided")
    assert verdicts["Iso-CTS is above KnOTS-TIES"] == "not measured yet"
    assert all(
        f"| {claim['text']} | {claim['source']} | **{claim['verdict']}** |" in text for claim in summary["claims"]
    )
    assert {path.name for path in done.places.results.glob("*.png")} == {
        f"{name}.png" for name in ("seconds", "osrm", "tasks")
    }
    assert json.loads((done.places.results / "summary.json").read_text())["families"] == summary["families"]
    again = page.read_text()
    report.write_report(done.places.results, page)
    assert page.read_text() == again


def test_scores_are_those_of_single_passes(done: Done) -> None:
    """All labels in one sequence give what each label by itself gives, and what is left is the base."""
    bench, task = done.bench, done.bench.tasks["places"]
    wanted = [asked(bench, name, "test") for name in ("kinds", "places")]
    _, found = questions(bench, wanted).scores(bench.model)
    for place in (0, 7):
        text = bench.tokenizer(task.words.prompt(task.test[place].text))["input_ids"]
        for index, label in enumerate(task.labels):
            ending = [*bench.tokenizer(answer(label))["input_ids"], 0]
            with torch.no_grad():
                logits = bench.model(input_ids=torch.tensor([text + ending])).logits[0].log_softmax(-1)
            alone = sum(float(logits[len(text) - 1 + step, token]) for step, token in enumerate(ending))
            assert found[place, index] == pytest.approx(alone, abs=1e-3)
    weights = Weights(bench.model)
    layer = bench.model.model.layers[0].mlp.up_proj
    before = layer.weight.clone()
    weights.set({"model.layers.0.mlp.up_proj": torch.ones_like(before)}, 0.5)
    assert torch.allclose(layer.weight, before + 0.5)
    weights.set({})
    assert torch.equal(layer.weight, before)


def test_own_words_tell_tasks_apart(done: Done) -> None:
    assert len({words.instruction for words in OWN_WORDS.values()}) == len(OWN_WORDS)
    assert len({words.question for words in OWN_WORDS.values()}) == len(OWN_WORDS)
    assert Words("How?", "So:").prompt("a b") == "How?\na b\nSo:"
    assert Words().prompt("a b") == "a b\nLabel:"
    assert Settings().words == OWN_WORDS
    data, recorded = done.places.data, records.read_run(done.places.results)["settings"]
    assert {task.name: task.words for task in served.asked_tasks(data, recorded)} == {
        name: task.words for name, task in done.bench.tasks.items()
    }
    del recorded["words"]
    assert served.asked_tasks(data, recorded) == read_tasks(data, {}, SETTINGS.test)


def test_side_by_side_is_the_same_as_alone(done: Done) -> None:
    bench = done.bench
    tuning = replace(SETTINGS.tuning, steps=4)
    wanted = [Wanted(bench.tasks["kinds"], 0, 4, 16), Wanted(bench.tasks["moves"], 1, 2, 4, 0.5)]
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    together = train_bank(bench.model, bench.tokenizer, wanted, tuning)
    for one, found in zip(wanted, together, strict=True):
        [alone] = train_bank(bench.model, bench.tokenizer, [one], tuning)
        assert found.keys() == alone.keys()
        for name, pair in alone.items():
            assert pair.rank == one.rank
            assert pair.scaling == one.alpha / one.rank
            assert torch.allclose(found[name].delta(), pair.delta(), atol=1e-4)
    after = bench.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
