# SPDX-License-Identifier: Apache-2.0
"""vllm-merge tune: learn a recipe's weights, or correct its adapters, from prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from vllm_merge.cli.completion import recipe_names
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
    from vllm_merge.cli.output import ProgressBar
    from vllm_merge.recipe.plan import Plan
    from vllm_merge.tuning.methods import ObjectiveName
    from vllm_merge.tuning.record import Request
    from vllm_merge.tuning.tune import Result

Objective = StrEnum("Objective", ["entropy", "loss", "accuracy", "null_space", "tasks", "safety"])
Sampler = Literal["tpe", "random"]
Per = Literal["adapter", "layer", "part", "module"]
Agent = Literal["ppo", "random"]
METHODS = "adamerging, adamerging++, nsc, ssr, regmean, enmp, lorahub, lfs or rmm"


def tune(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe file.", metavar="RECIPE_FILE", show_default=False)],
    name: Annotated[
        str | None,
        typer.Argument(
            help="The recipe to begin with; not needed where the file has one.",
            metavar="NAME",
            autocompletion=recipe_names,
        ),
    ] = None,
    *,
    method: Annotated[str, typer.Option(help=f"{METHODS}.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help='The prompts, a line each: {"prompt": …}, with "answer" where the method needs one, and "task".',
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="The folder for the learned recipe, its record and report.", show_default=False
        ),
    ],
    objective: Annotated[
        list[Objective] | None,
        typer.Option(
            help="What is made small; each method has a default. lfs takes several, each by a further "
            "--objective, among them tasks (the loss of each) and safety.",
            show_default=False,
        ),
    ] = None,
    safety: Annotated[
        Path | None,
        typer.Option(help="Prompts with safe answers: their loss is made small too, and safe answers are counted."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(min=0, help="With --safety: loss on the safety set + ALPHA × the objective.")
    ] = 0.3,
    floor: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --safety: the least share of safe answers with which it may be served."),
    ] = None,
    per: Annotated[
        Per | None,
        typer.Option(
            help="What has a weight of its own; part: attention and MLP of a layer apart. Each method has a default.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps; generations of a search. Each method has a default.", show_default=False),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts of each task in a step.", show_default="4")] = None,
    rate: Annotated[float, typer.Option(min=1e-8, help="The learning rate, where gradients are taken.")] = 0.01,
    answer_tokens: Annotated[
        int, typer.Option(min=1, help="The longest answer that the model or an adapter gives itself meanwhile.")
    ] = 64,
    rules: Annotated[
        str | None,
        typer.Option(
            help="Of rmm: the merge methods that a block may come from, beside the recipe's own (ties,dare_ties). Of lfs: "
            "those of task_arithmetic, ties, slerp, linear, tsv_m, wudi, none that it chooses from (the first four).",
            show_default=False,
        ),
    ] = None,
    agent: Annotated[
        Agent | None,
        typer.Option(help="Of rmm: who chooses; random is what ppo is to be compared with.", show_default="ppo"),
    ] = None,
    groups: Annotated[
        int | None, typer.Option(min=1, help="Of lfs: into how many groups the layers are divided.", show_default="4")
    ] = None,
    sampler: Annotated[
        Sampler | None,
        typer.Option(
            help="Of lfs: who makes candidates; random is what tpe is to be compared with.", show_default="tpe"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first LIMIT prompts of each task.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    model: Annotated[str | None, typer.Option(help="The base model; otherwise the file's base_model.")] = None,
    device: Annotated[str, typer.Option(help="Where to run the model: cpu, cuda, cuda:1, …")] = "cpu",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="The highest LoRA rank of the server; what `rank: auto` means.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in the folder ended.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Learn a recipe from prompts, and write it: plain, without data, for any server.

    \b
    adamerging    weights of a sum, by gradients; the entropy of the answers; no labels
    adamerging++  the same after TIES
    nsc           weights of a sum, by gradients; what the adapters do not see; no labels, no answers
    ssr, regmean  adapters corrected for one another by forward passes alone; no labels
    enmp          which adapters to leave out of which layers, by search; any merge method
    lorahub       weights from −1.5 to 1.5, by search; any merge method
    lfs           for each group of layers, attention and MLP apart, a rule and its parameters, by search
    rmm           for each layer the recipe's merge, another rule's or one adapter, chosen by an agent that learns

    Ctrl-C ends it after the step that runs, and keeps the best so far; --resume goes on.

    \b
    Examples:
      vllm-merge tune recipe.yaml support --method ssr --data prompts.jsonl -o tuned
      vllm-merge tune recipe.yaml --method lorahub --data qa.jsonl --safety safe.jsonl --floor 0.9 -o tuned
    """
    from vllm_merge.tuning.tune import tune as run

    with progress_bar("Reading") as bar:
        request, warnings = _request(
            recipe_file, name, method, data, output, objective, safety, alpha, floor, per, steps, batch, rate, answer_tokens,
            rules, agent, groups, sampler, limit, seed, model, device, max_rank, chat, resume, bar,
        )  # fmt: skip

        def replan(path: Path, chosen: str) -> Plan:
            from vllm_merge.cli.files import planned

            return planned(path, chosen, "float32", max_rank, bar).plan

        with interrupts() as stopped, _memory(device):
            result = run(request, replan=replan, notify=bar.update, stopped=stopped)
    written = output / result.recipe.name  # as it was given
    _print(result, written, warnings, json)
    if result.failure:
        raise MergeError(
            f"{result.failure}; the best so far, of step {result.facts['run']['best_step']}, is in {written}"
        )


def _request(
    recipe_file: Path,
    name: str | None,
    method: str,
    data: Path,
    output: Path,
    objectives: list[Objective] | None,
    safety: Path | None,
    alpha: float,
    floor: float | None,
    per: Per | None,
    steps: int | None,
    batch: int | None,
    rate: float,
    answer_tokens: int,
    rules: str | None,
    agent: Agent | None,
    groups: int | None,
    sampler: Sampler | None,
    limit: int | None,
    seed: int,
    model: str | None,
    device: str,
    max_rank: int | None,
    chat: bool,
    resume: bool,
    bar: ProgressBar,
) -> tuple[Request, list[str]]:
    """The checked request, and what is worth knowing about the recipe."""
    from vllm_merge.cli.device import checked_device
    from vllm_merge.cli.files import planned
    from vllm_merge.recipe_files import load_recipes
    from vllm_merge.tuning.data import read_prompts
    from vllm_merge.tuning.methods import Settings, tune_method
    from vllm_merge.tuning.record import Request

    if floor is not None and safety is None:
        raise UserInputError("--floor: is of the safety score; give --safety FILE, which it is measured on")
    if output.exists() and not output.is_dir():
        raise UserInputError(f"{output}: is not a folder; choose another --output")
    chosen = tune_method(method)
    named = None if rules is None else tuple(dict.fromkeys(rule.strip() for rule in rules.split(",")))
    objective, several = _aims(objectives or [], safety)
    settings = Settings(
        chosen, objective, per, steps, batch, rate, seed, alpha, answer_tokens, named, agent, groups, sampler, several
    ).checked()
    target = checked_device(device)
    prompts = read_prompts(data, limit)
    safe = None if safety is None else read_prompts(safety, limit)
    if safe is not None:
        safe.need_answers("--safety")
    prepared = planned(recipe_file, name, "float32", max_rank, bar)
    path = model or prepared.file.base_model
    if path is None:
        raise UserInputError(f"{recipe_file}: names no base_model; give --model DIR")
    written = load_recipes(recipe_file)  # with its adapters where the file has them, a folder or a repository
    request = Request(written, prepared.plan, path, settings, prompts, safe, floor, output, target, chat, resume)
    return request, prepared.warnings


def _aims(given: list[Objective], safety: Path | None) -> tuple[ObjectiveName | None, tuple[str, ...]]:
    """The one objective, or several; with several, what is of the data's answers or of the model's own."""
    chosen = tuple(dict.fromkeys(one.value for one in given))
    if "safety" in chosen and safety is None:
        raise UserInputError("--objective safety: is the loss on the safety set; give --safety FILE")
    plain = [cast("ObjectiveName", one) for one in chosen if one not in ("tasks", "safety")]
    if len(chosen) == 1 and plain:
        return plain[0], ()
    if chosen == ("safety",):
        raise UserInputError(
            "--objective safety: give another objective beside it; --safety alone adds it to the default"
        )
    answers = [one for one in chosen if one in ("loss", "accuracy", "tasks")]
    return (plain[0] if plain and not answers else "loss") if chosen else None, chosen


@contextmanager
def _memory(device: str) -> Iterator[None]:
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise MergeError(f"--device {device}: {reason}; a smaller --batch needs less, and --resume goes on") from None


def _print(result: Result, written: Path, warnings: list[str], json: bool) -> None:
    facts = result.facts
    if json:
        print_json({**facts, "recipe": str(result.recipe.absolute()), "warnings": warnings})
        return
    print_warnings(warnings)
    run = facts["run"]
    print_text(f"{facts['artifact']} → {written}", style="bold")
    ended = (
        f"stopped after {run['steps']} of {run['planned']} steps; --resume goes on"
        if run["stopped"]
        else f"{run['steps']} steps"
    )
    print_text(f"{facts['method']}: {ended}, {duration(run['seconds'])}, best at step {run['best_step']}")
    rows = table("", "start", "learned")
    add_row(rows, run["objective"], f"{run['start']:.4g}", f"{run['best']:.4g}")
    if scores := facts.get("accuracy"):
        for task in scores["learned"]["tasks"]:
            add_row(rows, f"{task}, % right", *(_share(scores[when]["tasks"][task]) for when in ("start", "learned")))
        add_row(rows, "mean, % right", *(_share(scores[when]["mean"]) for when in ("start", "learned")), style="bold")
    if safe := facts.get("safety"):
        add_row(rows, "safe answers, %", *(_share(safe[when]) for when in ("start", "learned")))
    print_table(rows)
    for note in facts["notes"]:
        print_text(f"- {note}")


def _share(score: dict[str, Any]) -> str:
    return f"{100 * score['accuracy']:.0f} ({100 * score['low']:.0f}–{100 * score['high']:.0f})"
