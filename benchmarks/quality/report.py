# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and the generated part of the pages of evidence, from what is recorded; half a minute on a CPU, no model.

python -m benchmarks.quality.report                            # both sets of results that are kept, and their pages
python -m benchmarks.quality.report --results DIR --page FILE  # another one
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from benchmarks.quality import tables
from benchmarks.quality.claims import UNMEASURED
from benchmarks.quality.learning import learned_table
from benchmarks.quality.pages import BEGIN, END, renewed, write_tuning
from benchmarks.quality.plots import SHOWN, write_plots
from benchmarks.quality.predictors import unequal
from benchmarks.quality.recorded import OWN_EDITION, ROOT, SAME_EDITION, Edition, Recorded
from benchmarks.quality.unmeasured import unmeasured
from benchmarks.quality.wording import compared, explored

TUNING = ROOT / "docs" / "tuning"
TITLES = {"plain": "Plain", "osrm": "OSRM", "osrm-mean": "OSRM (mean)", "mixed": "Mixed"}
PLOTS = {  # a title for each, and what is to be seen
    "seconds.png": (
        "Score and time",
        "Score against the seconds of the merge, plain adapters; those are named that are best or that the claims are about.",
    ),
    "ranks.png": ("Score and rank", "Score against the rank of the result, plain adapters, one seed."),
    "norms.png": ("Score and norms", "DO-Merging over task arithmetic, against how unequal two adapters are."),
    "osrm.png": (
        "With and without OSRM",
        "Each method with plain adapters, and with adapters that started from OSRM, on the tasks that both learnt.",
    ),
    "tasks.png": (
        "Score by task",
        f"Score of every task under each method, of the best {SHOWN} at most, plain adapters, lossless, the mean over seeds.",
    ),
}
HELD, GOALS = "What held and what failed", "Goals"
COMPARED, EXPLORED, LEFT = "Own words and the same words", "Words and learning rate", "Not measured"
Sections = dict[str, list[str]]
"""Lines of the page by the title that they stand under; none where nothing was measured."""


def write_editions() -> None:
    """Both sets of results, each page with links to what only the other has."""
    own, same = Recorded.of(OWN_EDITION.results), Recorded.of(SAME_EDITION.results)
    _write(own, OWN_EDITION.page, TUNING, (SAME_EDITION, same))
    _write(same, SAME_EDITION.page, None, (OWN_EDITION, own))


def write_report(results: Path, page: Path) -> dict[str, Any]:
    """Write summary.json and the plots to the results, and the generated part of the page; the summary."""
    return _write(Recorded.of(results), page, None, None)


def _write(found: Recorded, page: Path, tuning: Path | None, other: tuple[Edition, Recorded] | None) -> dict[str, Any]:
    """tuning: the folder with the pages of the methods that learn, if they are about these results."""
    summary = found.summary()
    sections = _sections(found)
    if found.scores.families:
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        (found.results / "summary.json").write_text(text, encoding="utf-8")
        for name in write_plots(found.scores, found.results):
            title, caption = PLOTS[name]
            image = f"![{caption}]({os.path.relpath(found.results / name, page.parent)})\n\n{caption}\n"
            sections[title].insert(0, image)
    if other is not None:
        _point_to(sections, found, *other, page)
    before = page.read_text(encoding="utf-8") if page.is_file() else f"# Evidence\n\n{BEGIN}\n{END}\n"
    parts = [line for title, lines in sections.items() if lines for line in (f"## {title}\n", *lines)]
    page.write_text(renewed(before, "\n".join(parts)), encoding="utf-8")
    if tuning is not None and other is not None:
        edition, beside = other
        link = os.path.relpath(edition.page, tuning)
        write_tuning(tuning, found.learned, len(found.scores.tasks), beside.learned, link)
    return summary


def _sections(found: Recorded) -> Sections:
    """All that a page can have, in order, but for plots and what the other page has."""
    run, scores = found.run, found.scores
    sections = {HELD: list(tables.verdicts(found.claims)), GOALS: list(tables.verdicts(found.goals))}
    if not scores.families:
        return sections
    sections[COMPARED] = []
    sections[EXPLORED] = list(explored(found.results))
    sections["Tasks and adapters"] = [*tables.gate(run, scores), *tables.minutes(found)]
    for kind in TITLES:
        for size in sorted({*run["settings"]["sizes"], len(scores.tasks)}, reverse=True):
            sections[f"{TITLES[kind]} adapters, {size} tasks"] = list(tables.merges(found, kind, size))
    sections[f"Merges that learn, {len(scores.tasks)} tasks"] = list(learned_table(found.learned))
    sections["The search for λ"] = list(tables.lambdas(scores))
    sections["One label set for all tasks"] = list(tables.joint(scores, run["settings"]["joint"]))
    sections["Does the interference report foresee the loss?"] = list(tables.predicting(found.predictors))
    sections["Served through vLLM"] = list(tables.served(found.results, run))
    sections |= {title: [] for title, _ in PLOTS.values()}
    sections[PLOTS["ranks.png"][0]] = list(tables.ranks(scores))
    sections[PLOTS["norms.png"][0]] = list(tables.norms(unequal(scores)))
    sections[LEFT] = list(unmeasured(run, found.rows))
    return sections


def _point_to(sections: Sections, mine: Recorded, edition: Edition, other: Recorded, page: Path) -> None:
    """Where only the other set has something, say so, with a link; and put both beside each other."""
    place = os.path.relpath(edition.page, page.parent)
    theirs = _sections(other)
    if any(sections.get(title) for title, _ in PLOTS.values()):  # else nothing here can draw
        theirs |= {title: [""] for name, (title, _) in PLOTS.items() if (edition.results / name).is_file()}
    if mine.results == OWN_EDITION.results:
        sections[COMPARED] = list(compared(mine, other))
    for title in set(sections) & set(theirs) - {COMPARED, EXPLORED, LEFT}:
        if theirs[title] and not sections[title]:
            link = f"{place}#{anchor(title)}"
            sections[title] = [
                f"Not measured in this set. Of adapters that were asked in {edition.name} it [was]({link}).\n"
            ]
    for title, own, others in ((HELD, mine.claims, other.claims), (GOALS, mine.goals, other.goals)):
        verdicts = {claim.text: claim.verdict for claim in others if claim.verdict != UNMEASURED}
        missing = [claim.text for claim in own if claim.verdict == UNMEASURED and claim.text in verdicts]
        for text in missing:
            link = f"[{edition.name}]({place}#{anchor(title)})"
            sections[title].append(f'"{text}" **{verdicts[text]}** with adapters that were asked in {link}.\n')


def anchor(title: str) -> str:
    """Of a heading, in a link."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="the folder with rows.jsonl and run.json of another run")
    parser.add_argument("--page", type=Path, help="and the page whose generated part is written")
    args = parser.parse_args()
    if (args.results is None) != (args.page is None):
        parser.error("give --results and --page together, or neither of them")
    if args.results is None:
        write_editions()
        print(f"written: {OWN_EDITION.page}, {SAME_EDITION.page}, and the generated parts under {TUNING}")
        return
    summary = write_report(args.results, args.page)
    print(
        f"{len(summary['families'])} merges in {args.page}"
        if summary["families"]
        else f"nothing measured yet; see {args.page}"
    )


if __name__ == "__main__":
    main()
