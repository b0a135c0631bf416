# SPDX-License-Identifier: Apache-2.0
"""vllm-merge schema: the JSON Schema of recipe files."""

from vllm_merge.cli.output import print_json


def schema() -> None:
    """Print the JSON Schema of recipe files, which editors complete and check with.

    \b
    Examples:
      vllm-merge schema > recipe.schema.json
      # then, as the first line of a recipe file:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from vllm_merge.methods.preconditions import precondition_names
    from vllm_merge.methods.registry import default_registry
    from vllm_merge.recipe.json_schema import recipe_schema

    print_json(recipe_schema(default_registry(), precondition_names()))
