# SPDX-License-Identifier: Apache-2.0
"""What the pages of the quality benchmark say, of rows that are made up and of those that are recorded."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import grid, pages, plots, records, report, tables, wording
from benchmarks.quality.learning import METHODS, Learned
from benchmarks.quality.predictors import unequal
from benchmarks.quality.recorded import OWN_EDITION, ROOT, SAME_EDITION, Edition, Recorded
from benchmarks.quality.scores import Interval, Scores
from benchmarks.quality.settings import PRESETS, Settings
from benchmarks.quality.unmeasured import unmeasured
from tests.benchmarks.quality_rows import TASKS, bits, paired, rows


def test_nothing_is_said_of_what_was_not_measured(tmp_path: Path) -> None:
    report.write_report(tmp_path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text.count("Not measured yet.") == 2
    assert not any(word in text for word in ("held**", "failed**", "| "))
    assert not (tmp_path / "summary.json").exists()


def test_what_is_not_measured_is_named() -> None:
    run: dict[str, Any] = {"settings": asdict(Settings()), "gate": {"counted": list("abcdefgh")}}
    configs = grid.plan(Settings(), tuple("abcdefgh"))
    learners = [
        {
            "kind": "learned",
            "set": "plain",
            "seed": seed,
            "tasks": list("abcdefgh"),
            "method": method,
            "rank": "lossless",
        }
        for seed in (0, 1, 2)
        for method in METHODS
    ]
    everything = [*(config.row() for config in configs), *learners]
    assert list(unmeasured(run, everything)) == []
    without = [row for row in everything if row["method"] != "pcb" and (row["method"], row.get("seed")) != ("enmp", 1)]
    text = "\n".join(unmeasured(run, without))
    assert "pcb core, pcb delta, pcb knots." in text
    assert "Learners, seed 1: all but enmp." in text
    assert "seed 0" not in text
    planned = [c for c in configs if (c.set, len(c.tasks), c.rank) == ("plain", 8, 16)]
    gone = sum(config.method == "pcb" for config in planned)
    assert f"| plain | 8 | 16 | {len(planned) - gone} | {len(planned)} |" in text
    assert "Learners, seed 2: none." in "\n".join(unmeasured(run, [r for r in everything if r["seed"] != 2]))


def test_what_was_served_is_on_the_page_if_the_weights_are_those(tmp_path: Path) -> None:
    row = {"recipe": "tsv-m", "offline": 0.5, "served": 0.51, "difference": 0.01, "low": -0.01, "high": 0.03}
    row |= {"within_noise": True, "agreement": 0.99, "examples": 800, "weights": "x"}
    (tmp_path / "served.json").write_text(json.dumps([row, {**row, "recipe": "stale", "weights": "y"}]))
    text = "\n".join(tables.served(tmp_path, {"weights": {"plain/0": "x"}}))
    assert "| tsv-m | 50.0 | 51.0 | +1.0 (-1.0 to +3.0) | yes | 99.0 | 800 |" in text
    assert "stale" not in text
    assert list(tables.served(tmp_path, {"weights": {"plain/0": "z"}})) == []


def test_pages_of_methods_say_what_they_gained(tmp_path: Path) -> None:
    for name in pages.TUNING:
        (tmp_path / f"{name}.md").write_text(f"above\n{pages.BEGIN}\nstale\n{pages.END}\nbelow {pages.END}\n")
    score = Interval(0.54, 0.5, 0.58)
    run = Learned("ssr", "lossless", False, score, Interval(0.08, 0.04, 0.12), "tsv_m in core", 1, 45.2, 4)
    learned = [
        run,
        replace(
            run, method="nsc", gain=Interval(-0.2, -0.3, -0.1), beside=Interval(-0.3, -0.4, -0.2), rival="wudi in core"
        ),
        replace(run, method="enmp", labels=True, gain=Interval(0.01, -0.1, 0.1)),
    ]
    earlier = [replace(run, score=Interval(0.1, 0, 0.2)), replace(run, method="lorahub", score=Interval(0.3, 0.2, 0.4))]
    pages.write_tuning(tmp_path, learned, 8, earlier, "../old.md")
    found = {name: (tmp_path / f"{name}.md").read_text() for name in pages.TUNING}
    assert all(text.startswith("above\n") and text.endswith(f"below {pages.END}\n") for text in found.values())
    assert not any("stale" in text for text in found.values())
    words = "| ssr | lossless | for λ | 54.0 (50.0 to 58.0) | +8.0 (+4.0 to +12.0) | yes | tsv_m in core | 1 | 45 |"
    assert words in found["ssr"]
    assert words in found["index"]
    assert "| no | tsv_m" in found["nsc"]
    said = "On the tests wudi in core is the better one, lossless. Over it: nsc -30.0 (-40.0 to -20.0)."
    assert [name for name, text in found.items() if said in text] == ["nsc", "index"]
    assert "| used |" in found["enmp"]
    assert "| undecided | tsv_m" in found["enmp"]
    assert "Not measured yet: regmean." in found["regmean"]
    assert "Not measured yet: regmean, adamerging, adamerging++." in found["index"]
    assert not any("easured" in found[name] for name in ("ssr", "nsc", "enmp"))
    assert not any("| 10.0 (" in text for text in found.values())  # what was measured anew
    for name in ("lorahub", "index"):
        below = found[name].partition(
            "Measured only with adapters that were all asked in [the same words](../old.md#merges-that-learn-8-tasks)"
        )[2]
        assert "| lorahub | lossless | for λ | 30.0 (20.0 to 40.0) |" in below


def recorded(folder: Path, made: list[records.Row], **run: Any) -> Recorded:
    """What a folder with these rows says."""
    folder.mkdir(exist_ok=True)
    gate = {task: {"base": 0.5, "shots": 1, "single": 0.9, "chance": 0.5, "counts": True} for task in TASKS}
    settings = asdict(replace(Settings(), seeds=(0, 1), tasks=2, sizes=(2,)))
    content = {"settings": settings, "device": "GPU", "gate": {"counted": list(TASKS), "tasks": gate}, **run}
    records.write_run(folder, content)
    writer = records.Writer(folder)
    for row in made:
        writer.add(row)
    return Recorded.of(folder)


def test_what_only_the_other_set_has_is_pointed_to(tmp_path: Path) -> None:
    shares = {("task_arithmetic", "core", "lossless"): 0.7, ("tsv_m", "core", "lossless"): 0.8}
    mine = recorded(tmp_path / "mine", rows({("tsv_m", "core", "lossless"): 0.8}))
    theirs = recorded(tmp_path / "theirs", [*rows(shares), *rows(shares, "osrm")])
    (tmp_path / "docs").mkdir()
    page, other = tmp_path / "docs" / "mine.md", Edition("other words", theirs.results, tmp_path / "docs" / "theirs.md")
    report.write_report(theirs.results, other.page)
    report._write(mine, page, None, (other, theirs))
    text, there = page.read_text(), other.page.read_text()
    for title in ("OSRM adapters, 2 tasks", "With and without OSRM"):
        link = f"(theirs.md#{report.anchor(title)})"
        assert (
            f"## {title}\n\nNot measured in this set. Of adapters that were asked in other words it [was]{link}."
            in text
        )
        assert f"\n## {title}\n" in there
    assert "Not measured in this set" not in there
    assert "Mixed adapters" not in text + there  # neither has them
    gained = '"OSRM adapters give at least 5 points more" **failed** with adapters that were asked in [other words]'
    assert f"{gained}(theirs.md#goals)." in text
    assert 'KnOTS-TIES is above TIES" **' not in text
    assert "| tsv_m | core | 75.0 (" in text
    assert not (tmp_path / "mine" / "osrm.png").exists()


def test_anchors_are_those_of_headings() -> None:
    assert (
        report.anchor("Does the interference report foresee the loss?")
        == "does-the-interference-report-foresee-the-loss"
    )
    assert report.anchor("Merges that learn, 8 tasks") == "merges-that-learn-8-tasks"


def test_plots_that_say_nothing_are_not_drawn(tmp_path: Path) -> None:
    """Nor left from an earlier time. Two ranks are in the table."""
    pytest.importorskip("matplotlib")
    (tmp_path / "ranks.png").write_text("of earlier rows")
    shares = {("tsv_m", "core", "lossless"): 0.8, ("tsv_m", "core", "16"): 0.7}
    assert plots.write_plots(Scores(rows(shares), TASKS), tmp_path) == ["seconds.png", "tasks.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"seconds.png", "tasks.png"}
    more = Scores(rows({**shares, ("tsv_m", "core", "8"): 0.6}), TASKS)
    assert "ranks.png" in plots.write_plots(more, tmp_path)


def test_what_was_measured_on_another_device_is_told(tmp_path: Path) -> None:
    made = rows({("tsv_m", "core", "lossless"): 0.8, ("ties", "knots", "lossless"): 0.7})
    walls = {("tsv_m", 0): 60.0, ("ties", 0): 6.0, ("tsv_m", 1): 12.0, ("ties", 1): 12.0}
    for row in made:
        if row["kind"] == "merge":
            row["wall"] = walls[row["method"], row["seed"]]
            row |= {"device": "CPU"} if row["method"] == "tsv_m" and row["seed"] == 0 else {}
    found = recorded(tmp_path, made, **{"adapters plain": {"adapters": 4, "seconds": 30, "device": "GPU"}})
    assert "Measured on a CPU: tsv_m core." in list(tables.merges(found, "plain", 2))
    lines = list(tables.minutes(found))
    assert lines[1:-1] == [
        "| training 4 plain adapters | GPU | 0.5 |",
        "| 1 merge, added up; several shared a device | CPU | 1.0 |",
        "| 3 merges, added up; several shared a device | GPU | 0.5 |",
    ]
    call = {"device": "GPU", "minutes": 2.0, "jobs": 1}
    counted = list(tables.minutes(replace(found, run={**found.run, "calls": [call]})))
    assert counted[2] == "| training 4 plain adapters, of the minutes of merges | GPU | 0.5 |"
    assert counted[1] == "| merges, with the training of what was missing, in 1 process | GPU | 2.0 |"
    assert not any("3 merges" in line for line in counted)
    two = {**call, "count": 2, "devices": 2, "jobs": 4, "trained": ["osrm"]}
    counted = list(tables.minutes(replace(found, run={**found.run, "calls": [two]})))
    assert counted[1] == "| 2 merges, with the training of what was missing, in 4 processes | 2 × GPU | 2.0 |"
    assert counted[2] == "| training 4 plain adapters | GPU | 0.5 |"  # not within that call
    assert "| 3 merges, added up; several shared a device | GPU | 0.5 |" in counted  # of which two took those minutes
    again = {"what": "training once more", "device": "GPU", "minutes": 1.0, "jobs": 1}
    more = [two, {**two, "count": 1, "trained": []}, again]
    counted = list(tables.minutes(replace(found, run={**found.run, "calls": more})))
    assert counted[2:4] == [
        "| 1 merge in 4 processes | 2 × GPU | 2.0 |",
        "| training once more in 1 process | GPU | 1.0 |",
    ]
    assert not any("3 merges" in line for line in counted)


def test_merges_are_told_apart_where_intervals_say_so(tmp_path: Path) -> None:
    shares = {("tsv_m", "core"): 0.8, ("wudi", "core"): 0.795, ("task_arithmetic", "core"): 0.7, ("ctm", "core"): 0.6}
    made = rows({(*entry, rank): share for entry, share in shares.items() for rank in ("lossless", "16", "8")})
    found = recorded(tmp_path, made)
    lines = list(tables.merges(found, "plain", 2))
    assert "Lossless: tsv_m core is clearly above 2 of 3 others, not (wudi core).\n" in lines
    counts = "are 2 of 3 (tsv_m core, wudi core), clearly below 1 (ctm core)"
    assert f"Rank 16: clearly above task_arithmetic core {counts}.\n" in lines
    ranks = list(tables.ranks(found.scores))
    assert "| method | 8 | 16 | lossless |" in ranks[0]
    assert ranks[1].startswith("| tsv_m core | ")
    assert ranks[-2] == "| ctm core | 25.0 | 25.0 | 25.0 |"
    few = recorded(tmp_path / "few", rows({("tsv_m", "core", "lossless"): 0.8, ("wudi", "core", "lossless"): 0.7}))
    assert not any("clearly" in line for line in tables.merges(few, "plain", 2))
    assert list(tables.ranks(few.scores)) == []


@pytest.mark.parametrize("rising", [True, False])
def test_gains_of_pairs_with_unequal_norms(rising: bool) -> None:
    """DO-Merging over task arithmetic: more the more unequal the norms are, or whatever they are."""
    tasks, made = "abcdefg", []
    for row in paired("abcdefg"):
        row = {**row, "set": "mixed"}
        if row["kind"] == "single":
            made.append(row)
            continue
        ratio, gain = 1 + len(made) / 10, 0.005 * len(made) if rising else 0.1 + 0.05 * (len(made) // 2 % 2)
        for method, space, share in (("task_arithmetic", "core", 0.6), ("do_merging", "knots", 0.6 + gain)):
            right = {task: bits(share, 1) for task in row["tasks"]}
            made.append(row | {"method": method, "space": space, "bits": right, "report": {"norm ratio": ratio}})
    found = unequal(Scores(made, tasks))
    assert found is not None
    assert (len(found.gains), found.ratios[0]) == (21, pytest.approx(1.7))
    assert found.mean.low <= found.mean.value <= found.mean.high
    if rising:
        assert found.with_ratio.correlation.value > 0.95
        assert found.with_ratio.p < 0.05
    else:
        assert found.mean.value == pytest.approx((0.1 * 11 + 0.15 * 10) / 21 / 0.45, abs=0.01)
        assert abs(found.with_ratio.correlation.value) < 0.3
        assert found.with_ratio.p > 0.05
    assert "DO-Merging is above task arithmetic on 21, by +" in "".join(tables.norms(found))
    assert unequal(Scores(made[:-1], tasks)) is None  # a pair is missing
    assert list(tables.norms(None)) == []


def test_two_sets_are_compared_on_the_same_tests(tmp_path: Path) -> None:
    better = {("tsv_m", "core", "lossless"): 0.8, ("ctm", "core", "16"): 0.7, ("wudi", "core", "lossless"): 0.7}
    own = recorded(tmp_path / "own", rows(better))
    same = recorded(
        tmp_path / "same", rows({**better, ("tsv_m", "core", "lossless"): 0.7, ("iso_c", "core", "16"): 0.6})
    )
    lines = list(wording.compared(own, same))
    cells = {tuple(line.split(" | ")[:3]): line for line in lines if " core | " in line}
    assert set(cells) == {("| tsv_m", "core", "lossless"), ("| ctm", "core", "16"), ("| wudi", "core", "lossless")}
    assert "| 75.0 (" in cells["| tsv_m", "core", "lossless"]
    assert "| +25.0 (+" in cells["| tsv_m", "core", "lossless"]
    assert "| +0.0 (+0.0 to +0.0) | 2 |" in cells["| ctm", "core", "16"]
    assert "+12.5 (" in lines[1]  # the mean of the two that are lossless
    assert "on average of 2 methods with plain adapters, lossless" in lines[1]
    assert list(wording.compared(own, recorded(tmp_path / "none", []))) == []


def test_variants_are_compared_on_what_all_learnt(tmp_path: Path) -> None:
    """A task that one of them did not learn is in no score."""
    assert list(wording.explored(tmp_path)) == []
    single, norms = {"a": 0.9, "b": 0.8, "c": 0.7}, {"a": 0.1, "b": 0.2, "c": 0.15}
    variants = []
    for words, rate, unlearnt, share in (("own", 0.002, [], 0.6), ("same", 0.0005, ["c"], 0.2)):
        by_task = {task: share + (9 if task == "c" else 0) for task in single if task not in unlearnt}
        scores = {"tsv_m of 3": {"by_task": by_task}}
        variants.append(
            {
                "words": words,
                "learning_rate": rate,
                "single": single,
                "norms": norms,
                "unlearnt": unlearnt,
                "scores": scores,
            }
        )
    (tmp_path / wording.EXPLORATION).write_text("\n".join(map(json.dumps, variants)))
    lines = list(wording.explored(tmp_path))
    assert "| own | 0.002 | 80.0 | 10.0 to 20.0 | 60.0 |" in lines
    assert "| same | 0.0005 | 80.0 | 10.0 to 20.0 | 20.0 |" in lines
    assert "2 tasks that all variants learnt (a, b)" in lines[1]


def test_the_same_words_are_a_preset() -> None:
    same = PRESETS["same-words"]
    assert (same.words, same.tuning) == ({}, Settings().tuning)
    assert {name: preset.name for name, preset in PRESETS.items()} == {name: name for name in PRESETS}
    assert "words" not in records.read_run(SAME_EDITION.results)["settings"]
    words = records.read_run(OWN_EDITION.results)["settings"]["words"]
    assert words == {name: asdict(words) for name, words in Settings().words.items()}


def test_the_pages_of_methods_are_those_of_the_recorded_rows() -> None:
    summaries = [edition.results / "summary.json" for edition in (OWN_EDITION, SAME_EDITION)]
    own, same = (json.loads(path.read_text(encoding="utf-8"))["learned"] for path in summaries)
    shown = [*own, *(one for one in same if one["method"] not in {mine["method"] for mine in own})]
    for name, methods in pages.TUNING.items():
        page = (report.TUNING / f"{name}.md").read_text(encoding="utf-8")
        for one in shown:
            score = Interval(**one["score"]).in_words()
            assert (f"| {one['method']} | {one['rank']} | " in page) == (one["method"] in methods)
            assert (one["method"] not in methods) or f" | {score} | " in page
        absent = [method for method in methods if method not in {one["method"] for one in shown}]
        assert (f"Not measured yet: {', '.join(absent)}." in page) == bool(absent)


@pytest.mark.parametrize("edition", [OWN_EDITION, SAME_EDITION], ids=["own", "same"])
def test_the_page_says_what_is_recorded(edition: Edition) -> None:
    page = edition.page.read_text(encoding="utf-8")
    found = json.loads((edition.results / "summary.json").read_text(encoding="utf-8"))
    for claim in found["claims"]:
        assert f"| {claim['text']} | {claim['source']} | **{claim['verdict']}** | {claim['found']} |" in page
    [osrm] = [
        claim["found"] for claim in found["claims"] if claim["text"] == "OSRM adapters give at least 5 points more"
    ]
    figure = osrm.partition(",")[0]
    by_hand = page.partition(report.BEGIN)[0]
    assert f"{figure} points" in by_hand
    assert figure in (ROOT / "docs" / "osrm.md").read_text(encoding="utf-8")
    for one in found["left_out"]:
        assert f"| {one['set']} | {one['seed']} | {one['task']} | {100 * one['above']:+.1f} | " in page
    foretold = sum(one["verdict"] == "predicts" for one in found["predictors"])
    said = f"**{foretold or 'None'} of {len(found['predictors'])} "
    assert (said in page) == bool(found["predictors"])
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page):
        assert (edition.page.parent / path).is_file()


def test_links_between_the_pages_of_evidence_lead_to_headings() -> None:
    places = {edition.page.name: edition.page.read_text(encoding="utf-8") for edition in (OWN_EDITION, SAME_EDITION)}
    headings = {
        name: {report.anchor(line[3:]) for line in text.splitlines() if line.startswith("## ")}
        for name, text in places.items()
    }
    pointing = [*(ROOT / "docs").rglob("*.md")]
    links = [
        link
        for path in pointing
        for link in re.findall(r"\(([\w./-]*evidence[\w-]*\.md)#([\w-]+)\)", path.read_text(encoding="utf-8"))
    ]
    assert len(links) > 10
    for path, anchor in links:
        assert anchor in headings[Path(path).name], (path, anchor)


def test_figures_by_hand_are_those_of_the_table() -> None:
    """The scores that the page opens with."""
    by_hand, _, generated = OWN_EDITION.page.read_text(encoding="utf-8").partition(report.BEGIN)
    table = generated.partition("## Plain adapters, 8 tasks")[2]
    [tsv_m, *_] = re.findall(r"\| tsv_m \| core \| ([^|]+) \| ([^|]+) \|", table)
    [four, *_] = re.findall(r"\| tsv_m \| core \| ([^|]+) \|", generated.partition("## Plain adapters, 4 tasks")[2])
    learned = re.findall(r"\| regmean \| (?:lossless|16) \| for λ \| ([^|]+) \|", table)
    assert len(learned) == 2
    for score in (*tsv_m, four, *learned):
        assert score in by_hand
