# SPDX-License-Identifier: Apache-2.0
"""What a shell offers for a recipe's name: the names of the file that stands before it."""

from pathlib import Path

import typer


def recipe_names(ctx: typer.Context, incomplete: str) -> list[str]:
    """Recipes, aliases and adapters of the file, as far as it can be read; nothing where it cannot."""
    from vllm_merge.errors import UserInputError
    from vllm_merge.recipe.yaml_tree import read_yaml

    try:
        data = read_yaml(Path(ctx.params["recipe_file"])).data
    except (UserInputError, KeyError, TypeError):
        return []
    sections = [data.get(section) for section in ("recipes", "aliases", "adapters")] if isinstance(data, dict) else []
    return [
        name for section in sections if isinstance(section, dict) for name in section if name.startswith(incomplete)
    ]
