# SPDX-License-Identifier: Apache-2.0
"""The vllm-merge command: its subcommands, and how it ends: 0 done, 1 failed, 2 wrong input."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from vllm_merge.cli.convert import convert
from vllm_merge.cli.doctor import doctor
from vllm_merge.cli.eval import eval_
from vllm_merge.cli.experiment import experiment
from vllm_merge.cli.inspect import inspect
from vllm_merge.cli.merge import merge
from vllm_merge.cli.methods import methods
from vllm_merge.cli.osrm import ListsCommand, osrm
from vllm_merge.cli.output import print_error, print_text
from vllm_merge.cli.plan import plan
from vllm_merge.cli.schema import schema
from vllm_merge.cli.search import search
from vllm_merge.cli.serve import PASS_ON, serve
from vllm_merge.cli.tune import tune
from vllm_merge.cli.validate import validate
from vllm_merge.errors import MergeError, UserInputError

DONE, FAILED, WRONG_INPUT = 0, 1, 2

app = typer.Typer(
    name="vllm-merge",
    help="Merge LoRA adapters by recipe: inside a vLLM server, or offline to a PEFT folder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Each with what it is for, in the few words that fit beside its name.
app.command(
    context_settings=PASS_ON,
    options_metavar="--config RECIPE_FILE",
    short_help="Serve a base model with the recipes of a file.",
)(serve)
app.command(short_help="Merge by a recipe, and write a PEFT folder.")(merge)
app.command(short_help="Show what a merge would make and cost.")(plan)
app.command(short_help="Check a recipe file.")(validate)
app.command(short_help="List the merge methods and their parameters.")(methods)
app.command(short_help="Print the JSON Schema of recipe files.")(schema)
app.command(short_help="Make a recipe of a mergekit, PEFT or LoRAX merge.")(convert)
app.command(short_help="Show what is in an adapter.")(inspect)
app.command(short_help="Check everything that serving needs.")(doctor)
app.command("eval", short_help="Count what recipes get right on tasks.")(eval_)
app.add_typer(experiment, name="experiment", short_help="Read what experiments say, and decide.")
app.command(short_help="Learn a recipe from prompts.")(tune)
app.command(short_help="Find a recipe on a running server.")(search)
app.command(cls=ListsCommand, short_help="Start adapters where other tasks' inputs are not.")(osrm)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print_text(f"vllm-merge {version('vllm-merge')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Merge LoRA adapters by recipe: inside a vLLM server, or offline to a PEFT folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with `arguments` (default: those of the process) and exit."""
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="vllm-merge")
    except UserInputError as error:
        print_error(str(error))
        sys.exit(WRONG_INPUT)
    except MergeError as error:
        print_error(str(error))
        sys.exit(FAILED)
    except OSError as error:  # a full disk, a folder that may not be written
        print_error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        sys.exit(FAILED)
