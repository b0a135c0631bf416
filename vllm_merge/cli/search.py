# SPDX-License-Identifier: Apache-2.0
"""vllm-merge search: find a recipe on a running server, and promote it there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vllm_merge.cli.admin_call import TOKEN_VARIABLE, admin_post
from vllm_merge.cli.interrupts import interrupts
from vllm_merge.cli.output import (
    add_row,
    duration,
    print_json,
    print_table,
    print_text,
    print_warnings,
    progress_bar,
    table,
)
from vllm_merge.errors import MergeError, UserInputError

if TYPE_CHECKING:
    from vllm_merge.search.endpoint import Endpoint
    from vllm_merge.search.run import Result
    from vllm_merge.search.scores import Estimate

MetricName = Literal["exact", "regex", "logprob", "judge"]
SHOWN = 10  # candidates in the table


def search(
    *,
    server: Annotated[str, typer.Option(help="The server, such as http://localhost:8000.", show_default=False)],
    data: Annotated[
        Path | None, typer.Option(help='The examples, a line each: {"task": …, "prompt": …, "answer": …}.')
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option(help="In place of --data: tasks of lm-evaluation-harness, with commas between.")
    ] = None,
    lm_eval_tasks: Annotated[Path | None, typer.Option(help="With --lm-eval: a folder with tasks of your own.")] = None,
    metric: Annotated[MetricName, typer.Option(help="What an answer is worth.")] = "exact",
    pattern: Annotated[
        str | None, typer.Option(help="With regex: what it finds in an answer is compared with the expected one.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="With judge: the server of the judge; its key is JUDGE_API_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="With judge: its model.")] = None,
    judge_prompt: Annotated[
        Path | None, typer.Option(help="With judge: a file with what it is asked; {prompt}, {reference}, {answer}.")
    ] = None,
    adapters: Annotated[
        str | None, typer.Option(help="What is merged, with commas between; otherwise every registered adapter.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Merge methods, with commas between; otherwise all that merge weight changes.")
    ] = None,
    spaces: Annotated[
        str | None, typer.Option(help="Their spaces, with commas between; otherwise each method's default.")
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE, NAME=VALUE,VALUE,… or NAME=LOW..HIGH, also for weight, size and lambda; may be repeated."
        ),
    ] = None,
    rank: Annotated[str, typer.Option(help="Ranks of the result, with commas between: auto or numbers.")] = "auto",
    auto: Annotated[
        bool, typer.Option("--auto", help="Try methods the more often, the more they kept where it was recorded.")
    ] = False,
    candidates: Annotated[int, typer.Option(min=2, max=10_000, help="How many recipes are tried.")] = 30,
    eta: Annotated[int, typer.Option(min=2, max=10, help="One of so many goes on from rung to rung.")] = 3,
    requests: Annotated[int | None, typer.Option(min=1, help="Make at most so many requests.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="End after so many minutes, with the best so far.")
    ] = None,
    at_once: Annotated[
        int, typer.Option(min=1, max=256, help="Requests under way; fewer while the server is busy.")
    ] = 8,
    together: Annotated[
        int | None, typer.Option(min=1, max=64, help="Candidates side by side; otherwise the server's slots but one.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use LIMIT examples of each task; with --lm-eval 100.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")] = 0,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the best as a recipe file.")] = None,
    name: Annotated[str | None, typer.Option(help="What the best is called; otherwise its method and digits.")] = None,
    log: Annotated[Path | None, typer.Option(help="Keep every value there, a JSON object a line.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from --log.")] = False,
    promote: Annotated[
        str | None,
        typer.Option(
            help="If the best beats this alias of the server, add it there and move the alias.", metavar="ALIAS"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Find a recipe on a running server: candidates are merged there, and asked side by side.

    The server must merge for requests (VLLM_MERGE_ADHOC=on). Many candidates answer few examples, the better ones more
    (successive halving). Requests wait where the server says that it is busy, so that other traffic comes first.
    Ctrl-C ends it with the best so far; --resume goes on. --promote needs VLLM_MERGE_ADMIN_TOKEN.

    \b
    exact    the first line of the answer is the expected one
    regex    what --pattern finds in the answer is the expected one; without it, the expected one is a pattern
    logprob  mean log probability of the expected answer's tokens
    judge    a grade of 0 to 10 by another model

    \b
    Examples:
      vllm-merge search --server http://localhost:8000 --data dev.jsonl --auto --minutes 10 -o found.yaml
      vllm-merge search --server http://localhost:8000 --data dev.jsonl --methods ties,tsv_m --parameter density=0.1..0.5
      vllm-merge search --server http://localhost:8000 --lm-eval arc_easy --auto --promote assistant
    """
    from vllm_merge.cli.search_options import Asked, look_at, scorer_of, space_of
    from vllm_merge.recipe.values import NAME, NAME_RULE
    from vllm_merge.search.budget import Budget
    from vllm_merge.search.endpoint import Endpoint
    from vllm_merge.search.run import Request, run
    from vllm_merge.search.written import check_place

    if resume and log is None:
        raise UserInputError("--resume: goes on from a log; give --log FILE")
    if name is not None and NAME.fullmatch(name) is None:
        raise UserInputError(f"--name {name!r}: is not a name; a name is {NAME_RULE}")
    if promote is not None and not os.environ.get(TOKEN_VARIABLE):
        raise UserInputError(f"--promote: set {TOKEN_VARIABLE} to the token that the server was started with")
    if output is not None:
        check_place(output)
    asked = Asked(
        data, lm_eval, lm_eval_tasks, metric, pattern, judge, judge_model, judge_prompt, limit, max_tokens, chat, seed, at_once,
    )  # fmt: skip
    with progress_bar("Looking at the server") as bar, interrupts() as stopped:
        budget = Budget(requests, minutes, stopped)
        endpoint = Endpoint(server, budget, at_once)
        served = look_at(endpoint, adapters, together, promote)
        space = space_of(list(served.adapters), methods, spaces, parameter or [], rank, auto, seed)
        scorer, about, per_answer = scorer_of(asked, endpoint, budget)
        answers = None if requests is None else requests // per_answer
        wanted = Request(space, candidates, eta, answers, about, log, resume, promote)
        with closing(scorer):
            result = run(wanted, served, endpoint, scorer, budget, bar.update)
    facts = {"name": None, **result.facts(), "metric": about["metric"], "output": None, "promoted": None}
    if result.best is not None:
        facts["name"] = name or _name(result)
        if output is not None:
            _write(output, facts["name"], result, list(served.adapters), about)
            facts["output"] = str(output.absolute())
        if promote is not None:
            facts["promoted"] = _promoted(server, endpoint, facts["name"], promote, result)
    if json:
        print_json(facts)
    else:
        _print(result, facts, about)
    if result.best is None:
        raise MergeError(f"no candidate finished the first rung: {result.found.ended}")
    if promote is not None and facts["promoted"] is None:
        why = result.found.ended or "the best found does not beat it on the same examples"
        raise MergeError(f"alias {promote!r} stays as it is: {why}")


def _name(result: Result) -> str:
    from vllm_merge.search.run import recipe_name
    from vllm_merge.search.written import plain

    assert result.best is not None
    return recipe_name(plain(result.best.recipe))


def _write(path: Path, name: str, result: Result, adapters: Sequence[str], about: dict[str, Any]) -> None:
    from importlib.metadata import version

    from vllm_merge.search.written import text_of, write

    best = result.best
    assert best is not None
    mean = result.found.estimates[best.number].mean
    data = about["data"] if isinstance(about["data"], str) else ", ".join(about["data"])
    stamp = datetime.now(UTC).strftime("%Y-%m-%d")
    tried = len(result.found.rung)
    notes = [
        f"{version('vllm-merge')} on {stamp}: the best of {tried} recipes that were tried; {about['metric']} {_words_of(mean)} on "
        f"{mean.count} examples of {data}" + (f" (sha256 {about['sha256'][:12]})." if "sha256" in about else "."),
        "The figure is of examples that chose it; measure it anew on others. Copy the recipe into the server's recipe file, which "
        "has the adapters.",
    ]
    write(path, text_of(name, best.recipe, adapters, notes))


def _promoted(server: str, endpoint: Endpoint, name: str, alias: str, result: Result) -> dict[str, Any] | None:
    """What the server says, or None where the alias is as good as the best, or was not compared."""
    from vllm_merge.search.run import recipe_name
    from vllm_merge.search.written import plain

    best = result.best
    assert best is not None
    if (
        result.found.ended
        or result.against is None
        or result.found.estimates[best.number].mean.mean <= result.against.mean.mean
    ):
        return None
    known = {row["name"] for row in endpoint.get("/merge/recipes")["data"]}
    if name not in known or name != recipe_name(plain(best.recipe)):  # one of that name is the same recipe
        admin_post(server, f"/v1/merge/recipes/{name}", {"merge": plain(best.recipe)})
    moved = admin_post(server, f"/v1/merge/aliases/{alias}", {"target": name})
    return {"alias": alias, "recipe": name, "artifact": moved["artifact"], "generation": moved["generation"]}


def _print(result: Result, facts: dict[str, Any], about: dict[str, Any]) -> None:
    print_warnings(list(result.notes))
    rows = table("", "method", "space", "settings", "rung", "examples", about["metric"])
    for candidate in result.found.ranking[:SHOWN]:
        mean = result.found.estimates[candidate.number].mean
        rung = f"{result.found.rung[candidate.number]} of {len(result.rungs)}"
        add_row(
            rows,
            candidate.number,
            candidate.method,
            candidate.recipe["space"],
            candidate.settings,
            rung,
            mean.count,
            _words_of(mean),
        )
    if result.found.ranking:
        print_table(rows)
    failed = len(result.found.failures)
    dropped = f", {failed} of them failed" if failed else ""
    ended = f"; ended early: {result.found.ended}" if result.found.ended else ""
    print_text(
        f"{len(result.candidates)} candidates{dropped}; {result.requests:,} requests in {duration(result.seconds)}{ended}"
    )
    for number, reason in list(result.found.failures.items())[:SHOWN]:
        print_text(f"candidate {number} failed: {reason}")
    if facts["output"] is not None:
        print_text(f"{facts['name']} → {facts['output']}", style="bold")
    elif facts["name"] is not None:
        print_text(f"{facts['name']}: {result.best.name if result.best else ''}", style="bold")
    if result.against is not None:
        print_text(f"compared with: {_words_of(result.against.mean)} on the same examples")
    if promoted := facts["promoted"]:
        print_text(
            f"alias {promoted['alias']} is {promoted['recipe']} ({promoted['artifact']}) now, until the server ends; copy the "
            "recipe into its recipe file to keep it"
        )


def _words_of(value: Estimate) -> str:
    return f"{value.mean:.3f} ({value.low:.3f}–{value.high:.3f})"
