# SPDX-License-Identifier: Apache-2.0
"""vllm-merge validate: check a recipe file."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_merge.cli.output import print_json, print_text


def validate(
    recipe_file: Annotated[Path, typer.Argument(help="The recipe file.", metavar="RECIPE_FILE", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Check a recipe file: its keys, names, methods and parameters. Adapters are not read; `plan` reads them.

    \b
    Examples:
      vllm-merge validate recipe.yaml
      vllm-merge validate recipe.yaml --json
    """
    from vllm_merge.recipe.problems import counted
    from vllm_merge.recipe_files import load_recipes

    file = load_recipes(recipe_file)
    if json:
        print_json(
            {
                "file": str(recipe_file),
                "valid": True,
                "base_model": file.base_model,
                "adapters": list(file.adapters),
                "recipes": {name: recipe.merge_method for name, recipe in file.recipes.items()},
                "aliases": dict(file.aliases),
                "experiments": {name: list(found.arms) for name, found in file.experiments.items()},
            }
        )
        return
    counts = (
        ("adapter", file.adapters),
        ("recipe", file.recipes),
        ("alias", file.aliases),
        *([("experiment", file.experiments)] if file.experiments else []),
    )
    print_text(f"{recipe_file}: valid: " + ", ".join(counted(len(items), word) for word, items in counts))
