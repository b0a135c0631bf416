# SPDX-License-Identifier: Apache-2.0
"""vllm-merge eval: what a recipe gets right, beside its adapters and the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_merge.cli.completion import recipe_names
from vllm_merge.cli.output import add_row, print_error, print_json, print_table, progress_bar, table
from vllm_merge.errors import UserInputError

if TYPE_CHECKING:
    from vllm_merge.cli.output import ProgressBar
    from vllm_merge.evaluation.scores import Scores
    from vllm_merge.evaluation.tasks import Example
    from vllm_merge.recipe.file import RecipeFile

BASE = "base model"
COLUMNS = 6  # models side by side


def eval_(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe file.", metavar="RECIPE_FILE", show_default=False)],
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Recipes or aliases; every recipe of the file without any.",
            metavar="NAME",
            autocompletion=recipe_names,
        ),
    ] = None,
    *,
    data: Annotated[
        Path, typer.Option(help='The tasks, a line each: {"task": …, "prompt": …, "answer": …}.', show_default=False)
    ],
    server: Annotated[str | None, typer.Option(help="Ask this server, such as http://localhost:8000.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Without a server: this base model; otherwise the file's base_model.")
    ] = None,
    device: Annotated[str, typer.Option(help="Without a server: where to run the model.")] = "cpu",
    max_rank: Annotated[
        int | None, typer.Option(min=1, help="Without a server: its highest LoRA rank; what `rank: auto` means.")
    ] = None,
    floor: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if the mean of a recipe is under this share.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first LIMIT examples of each task.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Count what recipes get right on tasks, beside their adapters and the base model. For use before promoting one.

    An answer is right if its first line is the expected one. Accuracies have 95 % intervals; the mean counts each task
    alike. A server must serve the names of the file (`vllm-merge serve`); its API key is taken from OPENAI_API_KEY or
    VLLM_API_KEY. Without a server the recipes are merged here, and transformers runs the model.

    \b
    Examples:
      vllm-merge eval recipe.yaml support --data tasks.jsonl --server http://localhost:8000 --floor 0.6
      vllm-merge eval recipe.yaml --data tasks.jsonl --model ./model --limit 50 --json
    """
    from vllm_merge.cli.files import adapters_of, check_base_model
    from vllm_merge.evaluation.tasks import read_tasks
    from vllm_merge.recipe_files import load_recipes

    if server is not None and model is not None:
        raise UserInputError("--server and --model: give one of the two; the server has its model already")
    with progress_bar("Reading") as bar:
        examples = read_tasks(data, limit)
        file = load_recipes(recipe_file)
        recipes = list(dict.fromkeys(file.target(name) for name in names or file.recipes))
        if not recipes:
            raise UserInputError(f"{recipe_file}: has no recipes; name an adapter or add a recipe")
        adapters = [a for a in dict.fromkeys(a for r in recipes for a in adapters_of(file, r)) if a not in recipes]
        if server is not None:
            found = list(_from_server(server, adapters, recipes, examples, max_tokens, chat, bar))
        else:
            path = model or file.base_model
            if path is None:
                raise UserInputError(f"{recipe_file}: names no base_model; give --model DIR, or --server URL")
            check_base_model(path, "--model" if model else file.place("base_model"))
            found = list(_offline(file, path, device, max_rank, [*adapters, *recipes], examples, max_tokens, chat, bar))
    low = [scores for scores in found if scores.name in recipes and floor is not None and scores.mean.accuracy < floor]
    if json:
        results = [scores.to_dict() for scores in found]
        print_json({"data": str(data), "floor": floor, "passed": not low, "results": results})
    else:
        _print(found)
    for scores in low:
        print_error(f"{scores.name}: the mean {scores.mean.accuracy:.1%} is under the floor of {floor:.1%}")
    if low:
        raise typer.Exit(1)


def _from_server(
    url: str,
    adapters: Sequence[str],
    recipes: Sequence[str],
    examples: Sequence[Example],
    max_tokens: int,
    chat: bool,
    bar: ProgressBar,
) -> Iterator[Scores]:
    from vllm_merge.evaluation.scores import score
    from vllm_merge.evaluation.server import Server
    from vllm_merge.recipe.problems import listed

    server = Server(url, max_tokens, chat)
    served = server.models()
    missing = [name for name in (*adapters, *recipes) if name not in served]
    if missing:
        raise UserInputError(
            f"--server {url}: does not serve {listed(missing)} (it serves {listed(served)}); "
            "start it with `vllm-merge serve MODEL --config` and this recipe file"
        )
    bases = [name for name, parent in served.items() if parent is None][:1]
    prompts = [example.prompt for example in examples]
    kinds = {**dict.fromkeys(bases, BASE), **dict.fromkeys(adapters, "adapter"), **dict.fromkeys(recipes, "recipe")}
    for name, kind in kinds.items():
        answers = server.answers(name, prompts, _progress(bar, name, len(prompts)))
        yield score(name, kind, examples, answers)


def _offline(
    file: RecipeFile,
    path: str,
    device: str,
    max_rank: int | None,
    names: Sequence[str],
    examples: Sequence[Example],
    max_tokens: int,
    chat: bool,
    bar: ProgressBar,
) -> Iterator[Scores]:
    from vllm_merge.cli.device import checked_device
    from vllm_merge.cli.files import planned
    from vllm_merge.evaluation.offline import OfflineModel
    from vllm_merge.evaluation.scores import score
    from vllm_merge.plan_runner import run_plan

    target = checked_device(device)
    bar.update(f"Loading {path}")
    model = OfflineModel(path, target, max_tokens, chat=chat)
    prompts = [example.prompt for example in examples]
    yield score(BASE, BASE, examples, model.answers({}, prompts, _progress(bar, BASE, len(prompts))))
    for name in names:
        plan = planned(file.path, name, "float32", max_rank, bar).plan
        bar.update(f"Merging {name}")
        factors = run_plan(plan, device=target, report="brief").factors
        kind = "recipe" if plan.stages else "adapter"
        yield score(name, kind, examples, model.answers(factors, prompts, _progress(bar, name, len(prompts))))


def _progress(bar: ProgressBar, name: str, total: int) -> Callable[[int], None]:
    return lambda done: bar.update(f"Asking {name}", done, total)


def _print(found: Sequence[Scores]) -> None:
    for start in range(0, len(found), COLUMNS):
        part = found[start : start + COLUMNS]
        rows = table("% right", *(BASE if scores.kind == BASE else scores.name for scores in part))
        for task in part[0].tasks:
            add_row(rows, task, *(scores.tasks[task].in_words() for scores in part))
        add_row(rows, "mean", *(scores.mean.in_words() for scores in part), style="bold")
        print_table(rows)
