# SPDX-License-Identifier: Apache-2.0
"""vllm-merge experiment: what experiments say, and what is decided about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vllm_merge.cli.output import add_row, print_json, print_table, print_text, progress_bar, table
from vllm_merge.errors import UserInputError

if TYPE_CHECKING:
    from vllm_merge.experiments.planner import Baseline
    from vllm_merge.experiments.store import Store

experiment = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Read what experiments say, and decide about them.",
)

Name = Annotated[str, typer.Argument(help="The experiment.", metavar="NAME", show_default=False)]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="The store: a file or a PostgreSQL URL; otherwise VLLM_MERGE_STORE, or the file that servers use by default.",
        metavar="PATH|URL",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
Server = Annotated[str, typer.Option(help="The server that serves the experiment.", metavar="URL")]
Reason = Annotated[str, typer.Option(help="Why; kept with the decision.", metavar="TEXT")]
HERE = "http://localhost:8000"


@experiment.command("list", short_help="Every experiment of a store.")
def list_(store: StoreOption = None, json: Json = False) -> None:
    """List the experiments of a store: version, state, arms, and how many units took part."""
    from vllm_merge.experiments.overview import overview
    from vllm_merge.report.experiment_rows import moment

    opened = _open(store)
    facts = overview(opened)
    if json:
        print_json(facts)
        return
    if not facts:
        print_text(f"no experiments in {opened.place}")
        return
    rows = table("experiment", "version", "state", "arms", "primary", "units", "last")
    for row in facts:
        cells = (row["experiment"], row["version"], row["state"], ", ".join(row["arms"]), row["primary"] or "–")
        add_row(rows, *cells, f"{row['units']:,}", moment(row["last"]))
    print_table(rows)


@experiment.command(short_help="What an experiment says.")
def report(
    name: Name,
    store: StoreOption = None,
    version: Annotated[
        int | None, typer.Option(min=1, help="A version of its definition; otherwise the newest.")
    ] = None,
    json: Json = False,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with everything, which needs no other file.", metavar="FILE")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write the plots to this folder, as PNG and SVG.", metavar="DIR")
    ] = None,
) -> None:
    """Say what an experiment shows: a verdict, then every arm, metric, latency and guardrail, with intervals that hold however
    often they are looked at.

    Exits with 1 where the figures are not to be read: where arms do not have the units that their weights say.

    \b
    Examples:
      vllm-merge experiment report assistant-ab
      vllm-merge experiment report assistant-ab --html report.html --plots plots
      vllm-merge experiment report assistant-ab --store postgresql://user@host/db --json
    """
    from vllm_merge.cli.experiment_text import figures_of, page_of, print_report
    from vllm_merge.cli.pictures import write_page, write_plots
    from vllm_merge.experiments.report import report as read

    with progress_bar(f"Reading {name}"):
        facts = read(_open(store), name, version)
    written = [*write_plots(lambda: figures_of(facts), plots), *write_page(lambda: page_of(facts), html)]
    if json:
        print_json(facts)
    else:
        print_report(facts)
        for path in written:
            print_text(f"wrote {path}")
    if facts["imbalance"]["mismatch"]:
        raise typer.Exit(1)


@experiment.command(short_help="Give everybody one arm.")
def promote(
    name: Name,
    arm: Annotated[
        str, typer.Argument(help="The arm that everybody gets from now on.", metavar="ARM", show_default=False)
    ],
    server: Server = HERE,
    reason: Reason = "",
) -> None:
    """End an experiment with a winner: everybody gets its arm, and the experiment's alias moves to what it serves.

    Needs the admin token in VLLM_MERGE_ADMIN_TOKEN, and the server's API key, where it has one, in VLLM_API_KEY.
    """
    _decide(server, name, "promote", {"arm": arm, "reason": reason})
    print_text(f"{name}: everybody gets {arm}")


@experiment.command(short_help="Give everybody control.")
def stop(name: Name, server: Server = HERE, reason: Reason = "") -> None:
    """End an experiment without a winner: everybody who asks for it gets control. An alias that a promotion moved stays.

    Needs the admin token in VLLM_MERGE_ADMIN_TOKEN, and the server's API key, where it has one, in VLLM_API_KEY.
    """
    left = _decide(server, name, "stop", {"reason": reason}).get("alias_left")
    print_text(f"{name}: stopped; everybody gets control")
    if left:
        back, moved = f"POST /v1/merge/aliases/{left['alias']}", left["before"] is not None
        how = f"{back}/back moves it back to {left['before']}" if moved else f"{back} moves it"
        print_text(f"alias {left['alias']} still stands for {left['target']}, as it was promoted; {how}")


@experiment.command(short_help="How many units an experiment needs.")
def plan(
    share: Annotated[float | None, typer.Option(help="Control's share of a yes: 0.3 of thumbs up.")] = None,
    mean: Annotated[float | None, typer.Option(help="Control's mean, with --deviation.")] = None,
    deviation: Annotated[float | None, typer.Option(help="The standard deviation of one unit around the mean.")] = None,
    like: Annotated[
        str | None, typer.Option(help="Take control's figures from this experiment's primary metric.", metavar="NAME")
    ] = None,
    effect: Annotated[
        float | None, typer.Option(help="The smallest difference that matters: 0.02 is two points.")
    ] = None,
    lift: Annotated[float | None, typer.Option(help="The same as a share of control: 0.1 is 10 % more.")] = None,
    arms: Annotated[int, typer.Option(min=2, max=16, help="How many arms, with control.")] = 2,
    power: Annotated[float, typer.Option(help="The chance to find the effect.")] = 0.8,
    alpha: Annotated[float, typer.Option(help="The chance to find one where there is none.")] = 0.05,
    units_per_day: Annotated[float | None, typer.Option(help="New units (users) that come each day.")] = None,
    store: StoreOption = None,
    json: Json = False,
) -> None:
    """Plan an experiment: how many units it needs to find an effect while everybody looks at it, and how long that takes.

    \b
    Examples:
      vllm-merge experiment plan --share 0.3 --lift 0.1 --units-per-day 2000
      vllm-merge experiment plan --mean 3.2 --deviation 1.1 --effect 0.1 --arms 3
      vllm-merge experiment plan --like assistant-ab --lift 0.05
    """
    from dataclasses import asdict

    from vllm_merge.cli.experiment_text import print_plan
    from vllm_merge.experiments.planner import plan as make

    baseline = _baseline(share, mean, deviation, like, store)
    if (effect is None) == (lift is None):
        raise UserInputError("give one of --effect and --lift")
    found = make(
        baseline, effect if effect is not None else (lift or 0.0) * baseline.mean, arms, power, alpha, units_per_day
    )
    if json:
        print_json(asdict(found))
    else:
        print_plan(found)


@experiment.command(short_help="Write the store's rows as Parquet or CSV.")
def export(
    folder: Annotated[Path, typer.Argument(help="Where the files go.", metavar="DIR", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Of this experiment alone.", metavar="NAME")] = None,
    form: Annotated[Literal["parquet", "csv"], typer.Option("--format", help="The files' format.")] = "parquet",
    store: StoreOption = None,
    json: Json = False,
) -> None:
    """Write exposures, outcomes, pairs, units, decisions and definitions as files, one for each table."""
    from vllm_merge.experiments.export import export as write
    from vllm_merge.experiments.report import find

    opened = _open(store)
    if name is not None:
        find(opened, name)
    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"{folder}: is not a folder; choose another")
    with progress_bar(f"Writing {folder}"):
        written = write(opened, folder, form, name)
    if json:
        print_json({str(path): rows for path, rows in written.items()})
        return
    for path, rows in written.items():
        print_text(f"wrote {path} ({rows:,} rows)")


@experiment.command(short_help="Delete what is old.")
def prune(
    days: Annotated[float, typer.Option(min=1, help="Delete what is older than so many days.", show_default=False)],
    store: StoreOption = None,
    json: Json = False,
) -> None:
    """Delete exposures, outcomes, pairs and units that are older than DAYS. Definitions and decisions stay.

    Servers do this by themselves where VLLM_MERGE_STORE_DAYS is set.
    """
    from vllm_merge.experiments.retention import delete_older

    opened = _open(store)
    with progress_bar("Deleting"):
        gone = delete_older(opened, days)
    if json:
        print_json(gone)
        return
    print_text(", ".join(f"{count:,} {table}" for table, count in gone.items()) + " deleted")


def _open(store: str | None) -> Store:
    from vllm_merge.experiments.store import Store

    return Store.open(store, create=False)


def _baseline(
    share: float | None, mean: float | None, deviation: float | None, like: str | None, store: str | None
) -> Baseline:
    from vllm_merge.experiments.planner import Baseline
    from vllm_merge.experiments.planning import baseline_like

    if sum(given is not None for given in (share, mean, like)) != 1 or (mean is None) != (deviation is None):
        raise UserInputError("say what control does today: --share, or --mean and --deviation, or --like NAME")
    if share is not None:
        return Baseline.of_share(share)
    if mean is not None and deviation is not None:
        return Baseline.of_mean(mean, deviation)
    return baseline_like(_open(store), str(like))


def _decide(server: str, name: str, what: str, body: dict[str, Any]) -> dict[str, Any]:
    from vllm_merge.cli.admin_call import admin_post

    return admin_post(server, f"/v1/merge/experiments/{name}/{what}", body)
