# SPDX-License-Identifier: Apache-2.0
"""vllm-merge serve: vLLM's own server, with the recipes of a file."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_merge.errors import MergeError, UserInputError

if TYPE_CHECKING:
    from vllm_merge.recipe.file import RecipeFile

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def serve(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="The base model: a folder or a Hub name, as vLLM takes it.", metavar="MODEL")
    ],
    config: Annotated[Path, typer.Option("--config", help="The recipe file.", show_default=False)],
) -> None:
    """Serve a base model with the recipes, aliases and adapters of a file, through vLLM's OpenAI-compatible server.

    The file, its adapters and their fit to the model are checked first. Every other option, after the model, goes to
    vLLM as it is. What LoRA needs is added if you do not say it: --enable-lora, --max-loras, and a --max-lora-rank that
    is enough for every recipe.

    \b
    Examples:
      vllm-merge serve meta-llama/Llama-3.1-8B-Instruct --config recipes.yaml
      vllm-merge serve ./model --config recipes.yaml --port 8001 --max-loras 8
    """
    from vllm_merge.cli.files import check_base_model
    from vllm_merge.serving import launch
    from vllm_merge.serving.diagnosis import check_entry_points
    from vllm_merge.serving.settings import check_variables

    if model.startswith("-"):
        raise UserInputError(f"serve {model}: the model comes first, then --config FILE and vLLM's options")
    check_base_model(model, "MODEL")
    check_variables()
    rank = wanted_rank(model, config)
    if importlib.util.find_spec("vllm") is None:
        raise MergeError("vLLM is not installed; install it with `pip install 'vllm-merge[vllm]'`, then try again")
    if (plugin := check_entry_points()).state != "ok":  # vLLM would start, and serve the base model alone
        raise MergeError(f"vLLM would not find the plugin: it is {plugin.found}; {plugin.advice}")
    options = [*ctx.args, *launch.lora_options(ctx.args, rank)]
    command = launch.command(model, options)
    if len(options) > len(ctx.args):
        typer.echo(f"vllm-merge: adding {shlex.join(options[len(ctx.args) :])}", err=True)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **launch.environment(config)})


def wanted_rank(model: str, config: Path) -> int:
    """The highest rank that anything in the file can have without being truncated; checks the file and its adapters.

    Raises UserInputError, before vLLM starts, for a wrong file, and for adapters that cannot be read or that do not fit
    the model.
    """
    from vllm_merge.cli.files import check_fit, register_all
    from vllm_merge.recipe_files import load_recipes

    recipes = load_recipes(config)
    catalogue = register_all(recipes)
    check_fit(model, catalogue)
    ranks = {name: catalogue.get(name).summary.rank for name in catalogue.names()}
    return max([*(recipe_rank(recipes, name, ranks) for name in recipes.recipes), *ranks.values()], default=1)


def recipe_rank(recipes: RecipeFile, name: str, ranks: dict[str, int]) -> int:
    """A recipe's own number if it states one, else the sum of its sources' ranks."""
    known = dict(ranks)
    for stage in recipes.stage_order(name):
        recipe = recipes.recipes[stage]
        known[stage] = recipe.rank if isinstance(recipe.rank, int) else sum(known[source] for source in recipe.sources)
    return known[name]
