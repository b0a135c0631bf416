# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark in miniature: made-up tasks, a model of two layers, and everything from the corpus to the page."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.quality import grid, learned, parcel, records, report, run, served
from benchmarks.quality.bank import Wanted, train_bank
from benchmarks.quality.prepare import TRAINED, Bench, asked, few_shot, osrm, questions
from benchmarks.quality.scores import Scores
from benchmarks.quality.scoring import Weights
from benchmarks.quality.settings import Base, Learning, Member, Settings, Tuning
from benchmarks.quality.sweep import Sweep
from benchmarks.quality.tasks import OWN_WORDS, Words, answer, read_tasks
from vllm_merge import MergeError
from vllm_merge.cli.files import planned
from vllm_merge.cli.output import progress_bar
from vllm_merge.plan_runner import run_plan

FILLERS = [
    "the",
    "a",
    "of",
    "and",
    "with",
    "near",
    "under",
    "over",
    "old",
    "new",
    "quiet",
    "long",
    "small",
    "large",
    "round",
    "some",
]
WORDS = {
    "kinds": {"plant": "oak fern moss lily", "animal": "dog cat hen fox"},
    "moves": {"motion": "run jump swim climb", "rest": "sit sleep lie wait"},
    "places": {"town": "street shop tower square", "nature": "river hill forest lake"},
}
METHODS = ("task_arithmetic", "ties", "ctm")
STAGES = ("all tasks", "osrm", "pairs")
SETTINGS = Settings(
    name="miniature",
    base=Base(
        layers=2,
        width=64,
        heads=2,
        hidden=96,
        vocabulary=320,
        context=56,
        epochs=20,
        batch=32,
        learning_rate=6e-3,
        dropout=0.0,
        checks=2,
    ),
    tuning=Tuning(
        rank=4,
        alpha=16,
        steps=100,
        batch=16,
        learning_rate=1e-2,
        bank=4,
        samples=8,
        mixed=(Member(2, 8, 1.0), Member(8, 4, 0.5)),
    ),
    learning=Learning(gradients=4, generations=1, prompts=4, rate=0.05, answer_tokens=6),
    words={"noise": Words("a", "odd:")},
    seeds=(0,),
    tasks=3,
    sizes=(2, 3),
    ranks=(4,),
    validation=12,
    test=60,
    tokens_at_once=4096,
)


def sentence(rng: random.Random, words: list[str]) -> str:
    """Fillers with one of the words among them."""
    chosen = rng.choices(FILLERS, k=5)
    chosen.insert(rng.randrange(6), rng.choice(words))
    return " ".join(chosen)


def make_data(folder: Path) -> None:
    """Tasks that a word decides, one that nothing decides, and a corpus."""
    rng = random.Random(0)
    for task, labels in {**WORDS, "spare/noise": {"odd": "stone", "even": "stone"}}.items():
        (folder / task).mkdir(parents=True)
        for split, count in (("train", 160), ("valid", 20), ("test", 60)):
            picked = [rng.choice(list(labels)) for _ in range(count)]
            rows = [{"text": sentence(rng, labels[label].split()), "label": label} for label in picked]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    topics = [words.split() for labels in WORDS.values() for words in labels.values()]
    others = [label for labels in WORDS.values() for label in labels] + ["Label:", "odd", "even", "stone"]
    documents = ["\n".join(sentence(rng, topic) for _ in range(6)) for topic in rng.choices([*topics, others], k=250)]
    (folder / "corpus.txt").write_text("\n\n".join(documents), encoding="utf-8")


@dataclass(frozen=True)
class Done:
    """A run of the miniature, and what it had recorded."""

    places: run.Places
    bench: Bench
    rows: list[records.Row]

    def merges(self, **fields: Any) -> list[records.Row]:
        merges = [row for row in self.rows if row["kind"] == "merge"]
        return [row for row in merges if all(row[name] == value for name, value in fields.items())]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("quality")
    make_data(folder / "data")
    places = run.Places(SETTINGS, folder / "data", folder / "weights", folder / "results", "cpu")
    assert run.run(places, until=time.monotonic() + 600, methods=METHODS, stages=STAGES) == 0
    return Done(places, places.open(), records.read_rows(places.results))


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


def test_a_run_goes_on_where_it_was_cut(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.places.results, tmp_path / "results")
    places = replace(done.places, results=tmp_path / "results")
    file = tmp_path / "results" / "rows.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-2], lines[-1][:40]]))  # one is missing, one was cut in the middle of a line
    assert run.run(places, until=0, methods=METHODS, stages=STAGES) == 2
    gone = [json.loads(line)["set"] for line in lines[-2:]]
    assert run.run(places, until=0, methods=METHODS, stages=STAGES, sets=("osrm",)) == gone.count("osrm")
    assert run.run(places, until=0, methods=METHODS, stages=STAGES, sets=("plain",)) == gone.count("plain")
    assert run.run(places, until=time.monotonic() + 600, methods=METHODS, stages=STAGES) == 0
    after = {records.key(row): row for row in records.read_rows(places.results)}
    assert after.keys() == {records.key(row) for row in done.rows}
    last = json.loads(lines[-1])
    assert after[records.key(last)]["bits"] == last["bits"]


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


def test_adapters_trained_with_other_words_are_not_measured(done: Done, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    shutil.copytree(done.places.weights, weights)
    places = replace(done.places, weights=weights, results=tmp_path / "results")
    other = replace(places, settings=replace(SETTINGS, words={"kinds": Words("", "Sort:")}))
    mixed = replace(SETTINGS, tuning=replace(SETTINGS.tuning, mixed=(Member(2, 2, 1.0),)))
    [start, *_] = learned.wanted(done.rows, done.bench.counted(), (0,), ("ssr",))
    with pytest.raises(SystemExit, match="made with other settings or words"):
        run.run(other, until=time.monotonic() + 600)
    with pytest.raises(MergeError, match="made with other settings or words"):
        learned.learned(other.open(), Sweep(other.open()), start)
    assert records.read_rows(places.results) == []
    with pytest.raises(SystemExit, match="made with other settings or words"):
        osrm(other.open(), done.bench.counted(), "osrm")
    assert run.run(replace(places, settings=mixed), until=0) > 0  # which the plain ones have nothing of
    (weights / "adapters" / "plain" / "0" / TRAINED).unlink()
    with pytest.raises(SystemExit, match="made with other settings or words"):
        run.run(places, until=time.monotonic() + 600)


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


def test_processes_take_gpus_in_turn(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for count, device in ((2, "cuda"), (2, "cuda:1"), (2, "cpu"), (1, "cuda"), (0, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for number in (1, 2, 3):
            monkeypatch.setattr(multiprocessing.current_process(), "name", f"SpawnPoolWorker-{number}")
            replace(done.places, device=device).take_gpu()
    assert taken == [1, 0, 1]


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


def test_weights_in_a_parcel(done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unpacked is what was measured, to the bit."""
    monkeypatch.setattr(parcel, "PART_BYTES", 50_000)
    things = ["base", "osrm/0", "plain/0", "starts"]
    for what in things:
        parts = parcel.pack(done.places.weights, what, tmp_path / "parcel")
        assert len(parts) > (what != "starts")
        assert all(part.stat().st_size <= 50_000 for part in parts)
    assert parcel.unpack(tmp_path / "parcel", tmp_path / "weights") == things
    there = replace(done.places, weights=tmp_path / "weights").open()
    for name, value in done.bench.model.state_dict().items():
        assert torch.equal(there.model.state_dict()[name], value)
        assert torch.equal(value, value.bfloat16().float())
    for kind in ("plain", "osrm"):
        assert served.same_weights(tmp_path / "weights", done.merges(stage="all tasks" if kind == "plain" else kind)[0])
    shutil.rmtree(there.adapter("plain", 0, "moves"))
    assert not served.same_weights(tmp_path / "weights", done.merges(stage="all tasks")[0])
    with pytest.raises(SystemExit, match="there already"):
        parcel.unpack(tmp_path / "parcel", tmp_path / "weights")
    with pytest.raises(SystemExit, match="has no parts"):
        parcel.unpack(tmp_path, tmp_path / "other")
    with pytest.raises(SystemExit, match="allowed are base, starts"):
        parcel.pack(done.places.weights, "nobody/0", tmp_path / "parcel")


def test_rows_of_other_weights_do_not_count(done: Done, tmp_path: Path) -> None:
    """They are neither read nor held against what is to be measured; `begin_anew` leaves the record of the base alone."""
    results = tmp_path / "results"
    shutil.copytree(done.places.results, results)
    assert records.read_rows(results) == done.rows
    before = records.read_run(results)
    assert before["base"]["kept_in"] == "bfloat16"
    records.write_run(results, {**before, "weights": {**before["weights"], "plain/0": "of others"}})
    left = records.read_rows(results)
    assert {row["set"] for row in left if "set" in row} == {"osrm", "mixed"}
    places = replace(done.places, results=results)
    assert run.run(places, until=0, methods=METHODS, stages=STAGES) == 0  # whose adapters are those of the rows
    assert records.read_run(results)["weights"] == before["weights"]
    lines = (results / "rows.jsonl").read_text().splitlines()
    stale = [json.dumps({**json.loads(line), "weights": "of others"}) for line in lines]
    (results / "rows.jsonl").write_text("\n".join(stale) + "\n")
    merges = len(done.merges())
    assert run.run(places, until=0, methods=METHODS, stages=STAGES) == merges
    assert not [row for row in records.read_rows(results) if row["kind"] == "merge"]
    records.begin_anew(results)
    assert records.read_rows(results) == []
    assert records.read_run(results) == {name: before[name] for name in ("settings", "device", "versions", "base")}


def test_seeds_whose_weights_are_elsewhere_stay_as_they_are_recorded(done: Done, tmp_path: Path) -> None:
    """Some seeds go on without the adapters of the others, which are neither trained again nor forgotten."""
    results = tmp_path / "results"
    shutil.copytree(done.places.results, results)
    lines = (results / "rows.jsonl").read_text().splitlines()
    moved = [
        {**row, "seed": 1, "weights": "elsewhere"} for line in lines if (row := json.loads(line)).get("set") == "plain"
    ]
    kept = [line for line in lines if json.loads(line).get("method") != "ctm"]
    (results / "rows.jsonl").write_text("\n".join([*kept, *map(json.dumps, moved)]) + "\n")
    before = records.read_run(results)
    named = {**before["weights"], "plain/1": "elsewhere"}
    gate = {**before["gate"], "weights": {**before["gate"]["weights"], "plain/1": "elsewhere"}}
    records.write_run(results, {**before, "weights": named, "gate": gate})
    places = replace(done.places, results=results, settings=replace(SETTINGS, seeds=(0, 1)))
    left = run.run(places, until=time.monotonic() + 600, methods=("ctm",), stages=("all tasks",), seeds=(0,))
    assert left == 0
    after = records.read_rows(results)
    assert [row for row in after if row.get("seed") == 1] == moved
    assert {row["rank"] for row in after if row.get("method") == "ctm" and row["seed"] == 0} == {"lossless", 4}
    assert records.read_run(results)["weights"] == named
    assert records.read_run(results)["gate"] == gate
    assert not done.bench.adapter("plain", 1, "kinds").exists()


def test_jobs_measure_what_one_does(done: Done, tmp_path: Path) -> None:
    """And the set that comes next is trained meanwhile."""
    shutil.copytree(done.places.results, tmp_path / "results")
    (tmp_path / "results" / "rows.jsonl").write_text("")
    shutil.copytree(done.places.weights, tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "adapters" / "osrm")
    places = replace(done.places, results=tmp_path / "results", weights=tmp_path / "weights")
    stages = ("all tasks", "osrm")
    assert run.run(places, until=time.monotonic() + 600, jobs=2, methods=("ctm",), stages=stages) == 0
    found = {records.key(row): row for row in records.read_rows(places.results) if row["kind"] == "merge"}
    expected = {records.key(row): row for stage in stages for row in done.merges(method="ctm", stage=stage)}
    assert {row["set"] for row in found.values()} == {"plain", "osrm"}
    assert {key: row["bits"] for key, row in found.items()} == {key: row["bits"] for key, row in expected.items()}
