# SPDX-License-Identifier: Apache-2.0
"""`vllm-merge serve`: vLLM's own server, with the recipes of a file."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import load_recipes
from vllm_merge.serving import launch


def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="The base model: a folder or a hub name, as vLLM takes it.")],
    config: Annotated[Path, typer.Option("--config", help="The recipe file.")],
) -> None:
    """Serve a base model with the recipes, aliases and adapters of a file, through vLLM's OpenAI-compatible server.

    Every other option goes to vLLM as it is. What LoRA needs is added if you do not say it: --enable-lora, --max-loras, and
    a --max-lora-rank that is enough for every recipe.

    Example: vllm-merge serve meta-llama/Llama-3.1-8B-Instruct --config recipes.yaml --port 8000
    """
    rank = wanted_rank(config)
    options = [*ctx.args, *launch.lora_options(ctx.args, rank)]
    command = launch.command(model, options)
    if len(options) > len(ctx.args):
        typer.echo(f"vllm-merge: adding {shlex.join(options[len(ctx.args) :])}", err=True)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **launch.environment(config)})


def wanted_rank(config: Path) -> int:
    """The highest rank that anything in the file can have without being truncated; checks the file and its adapters.

    Raises UserInputError, before vLLM starts, for a wrong file or an adapter that cannot be read.
    """
    recipes = load_recipes(config, default_registry())
    catalogue = Catalogue()
    ranks: dict[str, int] = {}
    problems = []
    for name, source in recipes.adapters.items():
        try:
            ranks[name] = catalogue.register(name, source.path, source.revision).summary.rank
        except MergeError as error:
            problems.append(str(error))
    if problems:
        raise UserInputError("\n".join(problems))
    return max([recipe_rank(recipes, name, ranks) for name in recipes.recipes] + list(ranks.values()), default=1)


def recipe_rank(recipes: RecipeFile, name: str, ranks: dict[str, int]) -> int:
    """A recipe's own number if it states one, else the sum of its sources' ranks."""
    recipe = recipes.recipes[name]
    if isinstance(recipe.rank, int):
        return recipe.rank
    used = [item.adapter for item in recipe.adapters]
    return sum(ranks[u] if u in ranks else recipe_rank(recipes, u, ranks) for u in used)
