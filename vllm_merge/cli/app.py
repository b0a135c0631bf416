# SPDX-License-Identifier: Apache-2.0
"""The vllm-merge command: its subcommands, and how it ends: 0 done, 1 failed, 2 wrong input."""

import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from vllm_merge.cli.inspect import inspect
from vllm_merge.cli.merge import merge
from vllm_merge.cli.methods import methods
from vllm_merge.cli.output import print_error
from vllm_merge.cli.plan import plan
from vllm_merge.cli.schema import schema
from vllm_merge.cli.validate import validate
from vllm_merge.errors import MergeError, UserInputError

DONE, FAILED, WRONG_INPUT = 0, 1, 2

app = typer.Typer(
    name="vllm-merge",
    help="Merge LoRA adapters by recipe: inside a vLLM server, or offline to a PEFT folder.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (merge, plan, validate, methods, schema, inspect):
    app.command()(command)

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command(add_help_option=False, context_settings=_PASS_ON)
def serve(ctx: typer.Context) -> None:
    """Serve a base model with the recipes of a file, through vLLM's OpenAI-compatible server."""
    # Its module is imported when it is asked for, and not for every other command.
    command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    command.command(context_settings=_PASS_ON)(import_module("vllm_merge.cli.serve").serve)
    command(args=ctx.args, prog_name="vllm-merge serve")


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
