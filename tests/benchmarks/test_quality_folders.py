# SPDX-License-Identifier: Apache-2.0
"""The folders of the quality benchmark, in miniature: runs that were cut, weights from elsewhere, several processes."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.quality import learned, parcel, records, run, served
from benchmarks.quality.prepare import TRAINED, osrm
from benchmarks.quality.settings import Member
from benchmarks.quality.sweep import Sweep
from benchmarks.quality.tasks import Words
from tests.benchmarks.quality_miniature import METHODS, SETTINGS, STAGES, Done
from vllm_merge import MergeError


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


def test_processes_take_gpus_in_turn(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for count, device in ((2, "cuda"), (2, "cuda:1"), (2, "cpu"), (1, "cuda"), (0, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for number in (1, 2, 3):
            monkeypatch.setattr(multiprocessing.current_process(), "name", f"SpawnPoolWorker-{number}")
            replace(done.places, device=device).take_gpu()
    assert taken == [1, 0, 1]


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
