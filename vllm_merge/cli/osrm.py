# SPDX-License-Identifier: Apache-2.0
"""vllm-merge osrm: adapters to train on from, each out of the way of the other tasks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from vllm_merge.cli.output import add_row, print_json, print_table, print_text, print_warnings, progress_bar, table
from vllm_merge.errors import UserInputError

if TYPE_CHECKING:
    from vllm_merge.adapters.factors import Adapter
    from vllm_merge.cli.output import ProgressBar
    from vllm_merge.training.osrm import Variant
    from vllm_merge.training.samples import TaskSamples
    from vllm_merge.training.starts import Start

LISTS = ("--tasks", "--target-modules", "--adapters")


class ListsCommand(TyperCommand):
    """A command whose LISTS take any number of values: `--tasks a b c` is `--tasks a --tasks b --tasks c`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click; the lists are taken apart first."""
        apart: list[str] = []
        current = ""
        for word in args:
            if word.startswith("-"):
                current = word if word in LISTS else ""
            elif current and apart[-1] != current:
                apart.append(current)
            apart.append(word)
        return super().parse_args(ctx, apart)


def osrm(
    base: Annotated[
        str, typer.Argument(help="The base model: a folder, or a Hub name.", metavar="BASE", show_default=False)
    ],
    tasks: Annotated[
        list[Path],
        typer.Option(
            help="The tasks: folders with train.jsonl, or files of such lines, {'text': …} or {'prompt': …}.",
            metavar="DIR...",
            show_default=False,
        ),
    ],
    rank: Annotated[int, typer.Option(min=1, help="The rank of the adapters.", show_default=False)],
    target_modules: Annotated[
        list[str],
        typer.Option(
            help="Names of linear layers, such as q_proj, or all-linear.", metavar="NAME...", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="The folder to write, a folder in it for each task.",
            metavar="DIR",
            show_default=False,
        ),
    ],
    variant: Annotated[
        str, typer.Option(help="covariance, as in the paper, or mean, as in its code.", metavar="covariance|mean")
    ] = "covariance",
    alpha: Annotated[
        float | None, typer.Option(help="lora_alpha of the adapters.", show_default="twice the rank")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many texts of each task to read.")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest text.")] = 128,
    template: Annotated[
        str | None,
        typer.Option(
            help="How a text is made of a line's fields, as in training: '{text} Label: {label}'.",
            show_default="the text",
        ),
    ] = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option(
            help="Trained adapters, one for each task in the same order: project them instead. Lossy.", metavar="DIR..."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run the model.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the choice of texts, and of directions among equals.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """Write an adapter for each task to be trained on from, in the directions that the inputs of the other tasks use
    least (OSRM, arXiv:2505.22934). It is meant to let the trained adapters disturb each other less when they are
    merged.

    A few texts of every task go through the base model; neither labels nor gradients are needed. A is the OSRM
    initialisation and B is 0: load a folder with PEFT's PeftModel.from_pretrained(…, is_trainable=True) and train.

    \b
    Examples:
      vllm-merge osrm ./model --tasks data/sql data/code --rank 16 --target-modules q_proj v_proj -o starts
      vllm-merge osrm ./model --tasks data/sql data/code --rank 64 --target-modules all-linear -o projected \\
        --adapters adapters/sql adapters/code
    """
    from vllm_merge.adapters.folders import new_folder
    from vllm_merge.training.samples import read_samples
    from vllm_merge.training.starts import FACTS_FILE, LOSSY, write_json, write_projected, write_start

    chosen = _variant(variant)
    if len(tasks) < 2:
        raise UserInputError("--tasks: OSRM keeps each task out of the way of the others; give two at least")
    found = [read_samples(path, samples, template, seed) for path in tasks]
    names = [task.name for task in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserInputError(
            f"--tasks: {len(names)} tasks, and more than one is called {min(twice)!r}; rename a folder"
        )
    trained = _trained(adapters, names)
    alpha = 2 * rank if alpha is None else alpha
    if not (alpha > 0 and math.isfinite(alpha)):
        raise UserInputError(f"--alpha {alpha:g}: expected a number above 0")
    with progress_bar(f"Loading {base}") as bar:
        layers, starts, counts = _starts(
            base, device, found, trained, target_modules, rank, max_tokens, chosen, seed, bar
        )
        rows: dict[str, dict[str, Any]] = {}
        with new_folder(output) as folder:
            for index, task in enumerate(found):
                bar.update(f"Writing {task.name}", index, len(found))
                start = starts[task.name]
                row = {"samples": len(task.texts), "tokens": counts[task.name], **start.facts()}
                if trained:
                    row["energy_kept"] = write_projected(folder / task.name, trained[task.name], start)
                else:
                    write_start(folder / task.name, start, layers, target_modules, alpha, base)
                rows[task.name] = row
            facts = {
                "base_model": base,
                "kind": "post-hoc" if trained else "initialisation",
                "lossy": bool(trained),
                "variant": chosen,
                "rank": rank,
                **({"note": LOSSY} if trained else {"alpha": alpha}),
                "seed": seed,
                "device": device,
                "tasks": rows,
            }
            write_json(folder / FACTS_FILE, facts)
    if json:
        print_json({"output": str(output), **facts})
        return
    if trained:
        print_warnings([f"the adapters were {LOSSY}"])
    _print(facts)
    print_text(f"wrote {output}, {len(layers)} modules of rank {rank} for each of {len(rows)} tasks")


def _starts(
    base: str,
    device: str,
    tasks: list[TaskSamples],
    trained: dict[str, Adapter],
    targets: list[str],
    rank: int,
    max_tokens: int,
    variant: Variant,
    seed: int,
    bar: ProgressBar,
) -> tuple[dict[str, Any], dict[str, Start], dict[str, int]]:
    """The layers of the model, a start for each task, and how many tokens each task had."""
    from vllm_merge.cli.device import checked_device
    from vllm_merge.training.inputs import target_layers
    from vllm_merge.training.model import BaseModel
    from vllm_merge.training.starts import osrm_starts

    model = BaseModel(base, checked_device(device))
    layers = target_layers(model.model, targets)
    for name, adapter in trained.items():
        if strange := [module for module in adapter.factors if module not in layers]:
            raise UserInputError(
                f"--adapters {name}: changes {strange[0]}, which --target-modules does not name or the model does not have"
            )
    batches = {task.name: model.batches(task.texts, max_tokens) for task in tasks}
    counts = {name: sum(int(batch["attention_mask"].sum()) for batch in mine) for name, mine in batches.items()}
    starts = osrm_starts(
        model.model,
        layers,
        batches,
        rank,
        variant=variant,
        seed=seed,
        progress=lambda done, total: bar.update("Reading the samples", done, total),
    )
    return layers, starts, counts


def _variant(name: str) -> Variant:
    if name == "covariance":
        return "covariance"
    if name == "mean":
        return "mean"
    raise UserInputError(f"--variant {name}: is not known; allowed are covariance and mean")


def _trained(folders: list[Path] | None, names: list[str]) -> dict[str, Adapter]:
    from vllm_merge.adapters.peft import read_adapter, read_each

    if not folders:
        return {}
    if len(folders) != len(names):
        raise UserInputError(f"--adapters: {len(folders)} adapters for {len(names)} tasks; give one for each, in order")
    return dict(zip(names, read_each(read_adapter, folders), strict=True))


def _print(facts: dict[str, Any]) -> None:
    rows = table(
        "task", "samples", "tokens", "others' inputs", "own inputs", *(["energy kept"] if facts["lossy"] else [])
    )
    for name, row in facts["tasks"].items():
        kept = [f"{row['energy_kept']:.2%}"] if facts["lossy"] else []
        add_row(rows, name, row["samples"], row["tokens"], f"{row['others']:.3g}", f"{row['own']:.3g}", *kept)
    print_table(rows)
    print_text("inputs: what the adapter's A lets through of them, where random directions of its rank let through 1")
