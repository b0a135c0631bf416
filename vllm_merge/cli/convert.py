# SPDX-License-Identifier: Apache-2.0
"""vllm-merge convert: make a recipe file of a merge that was written for mergekit, PEFT or LoRAX."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_merge.cli.output import print_json, print_text, print_warnings
from vllm_merge.errors import UserInputError


def convert(
    file: Annotated[
        Path, typer.Argument(help="The configuration, arguments or request.", metavar="FILE", show_default=False)
    ],
    *,
    source: Annotated[
        Literal["mergekit", "peft", "lorax"] | None,
        typer.Option("--from", help="What it was written for; otherwise by its keys."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The recipe file to write; otherwise it is printed.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the recipe.")] = "merged",
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Where an adapter that the file names is; may be given several times."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print recipe and notes as JSON.")] = False,
) -> None:
    """Make a recipe file of a mergekit configuration over base+lora models, of the arguments of PEFT's
    add_weighted_adapter as JSON, or of a LoRAX request with merged_adapters; or say which part has no meaning here.

    \b
    Examples:
      vllm-merge convert mergekit.yaml -o recipe.yaml
      vllm-merge convert call.json --adapter sql=./adapters/sql --adapter code=./adapters/code
    """
    from vllm_merge.convert import convert as converted
    from vllm_merge.methods.registry import default_registry
    from vllm_merge.recipe_files import check_precondition

    if output is not None and output.exists():
        raise UserInputError(f"-o {output}: is there already; name a new file")
    found = converted(
        file, default_registry(), check_precondition, source=source, name=name, adapters=_paths(adapter or [])
    )
    if output is not None:
        output.write_text(found.to_yaml(), encoding="utf-8")
    if json:
        print_json({"recipe": found.document, "notes": list(found.notes)})
        return
    if output is None:
        print_text(found.to_yaml().rstrip())  # with the notes in it
        return
    print_warnings(found.notes)
    print_text(f"{file} → {output}")


def _paths(given: list[str]) -> dict[str, str]:
    paths = {}
    for item in given:
        name, separator, path = item.partition("=")
        if not (name and separator and path):
            raise UserInputError(f"--adapter {item}: allowed is NAME=PATH")
        paths[name] = path
    return paths
