# SPDX-License-Identifier: Apache-2.0
"""Every merge method on the demo: λ chosen on validation prompts, then right answers through the real server.

    make demo-methods

Takes the methods that are registered, and for each the recipes of configs/methods/METHOD.yaml. Writes
benchmarks/results/demo-methods.json and the tables of docs/methods/accuracy.md and choosing.md. Exit 1 where no method keeps 80 % of what
the adapters get right by themselves.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

from choose import GRID, choose, norm, sum_norm  # noqa: E402  (neighbours of this script, not packages)
from run import right_answers  # noqa: E402
from server import Server, merge_serve, running  # noqa: E402
from tasks import TASKS, examples  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from vllm_merge import Adapter, list_methods, load_recipes  # noqa: E402
from vllm_merge.methods.registry import RANKS, default_registry  # noqa: E402

CONFIGS = ROOT / "configs" / "methods"
RESULTS = ROOT / "benchmarks" / "results" / "demo-methods.json"
PAGE = ROOT / "docs" / "methods" / "accuracy.md"
CHOOSING = ROOT / "docs" / "methods" / "choosing.md"
BEGIN, END = "<!-- generated: make demo-methods -->", "<!-- end of generated -->"
# What choosing.md shows, in its order: recipe, and what it stands there for.
CHOICES = {
    "task-arithmetic": "the reference",
    "wudi": "uneven adapters, nothing to tune",
    "tsv-m": "many tasks of one importance",
    "do-merging": "uneven lengths",
    "ctm": "the rank of one adapter",
    "doge": "common directions taken out by descent",
    "ties": "signs that disagree",
    "opcm": "one after another",
    "karcher": "all of one length",
    "breadcrumbs-ties": "TIES as mergekit has it, dense",
    "iso-c": "a flat spectrum",
    "model-stock": "repeats of one task, not this",
}
MAX_RANK = 64
KEPT = 0.8
SEED = 1


def rows(methods: Collection[str]) -> Iterator[dict[str, Any]]:
    """Every recipe of these methods: what it is, and the recipes that it uses."""
    for spec in (spec for spec in list_methods() if spec.name in methods):
        path = CONFIGS / f"{spec.name}.yaml"
        if not path.is_file():
            raise SystemExit(f"{path}: is missing; every method has a recipe there")
        file = load_recipes(path)
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, recipe in file.recipes.items():
            stages = file.stage_order(name)
            if recipe.merge_method != spec.name or any(name in other.sources for other in file.recipes.values()):
                continue
            tasks = [s for s in dict.fromkeys(x for stage in stages for x in file.recipes[stage].sources) if s in TASKS]
            yield {
                "recipe": name,
                "method": spec.name,
                "space": recipe.space or spec.default_space,
                "tasks": tasks,
                "parameters": {k: v for k, v in recipe.parameters.items() if k != "lambda"},
                "precondition": recipe.precondition,
                "stages": {stage: document["recipes"][stage] for stage in stages},
            }


def merged_at_one(row: dict[str, Any], file: Path) -> Any:
    """The row's merge with λ = 1, at the server's rank."""
    from vllm_merge.adapters.peft import hash_adapter
    from vllm_merge.plan_runner import run_plan
    from vllm_merge.recipe.plan import make_plan

    recipes = load_recipes(file)
    hashes = {name: hash_adapter(entry.path) for name, entry in recipes.adapters.items()}
    settings: dict[str, Any] = {"base_model_hash": "", "max_rank": MAX_RANK, "dtype": "float32"}
    plan = make_plan(recipes, row["recipe"], registry=default_registry(), adapter_hashes=hashes, **settings)
    return run_plan(plan, report="brief")


def timed_merge(row: dict[str, Any], file: Path) -> tuple[Any, float]:
    """The row's merge with λ = 1, and its seconds on one core: those of the quickest of three, if they are short.

    Time of the processor, in one thread, so that it does not matter what else runs.
    """
    threads, seconds = torch.get_num_threads(), list[float]()
    torch.set_num_threads(1)
    try:
        while len(seconds) < 3 and sum(seconds) < 1:
            started = time.process_time()
            merged = merged_at_one(row, file)
            seconds.append(time.process_time() - started)
    finally:
        torch.set_num_threads(threads)
    return merged, round(min(seconds), 2)


def write_recipes(file: Path, of: list[dict[str, Any]]) -> None:
    """A recipe file with the recipes of these rows, each with its λ; lazy, so that the server starts at once."""
    stages: dict[str, Any] = {}
    for row in of:
        for name, recipe in row["stages"].items():
            last = name == row["recipe"]
            parameters = {**recipe.get("parameters", {}), **({"lambda": row.get("lambda", 1.0)} if last else {})}
            stages[name] = {**recipe, "parameters": parameters, "load": "lazy"}
    adapters = {name: {"path": str(HERE / "adapters" / name)} for name in TASKS}
    document = {"version": 1, "base_model": str(HERE / "model"), "adapters": adapters, "recipes": stages}
    file.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def choose_all(found: list[dict[str, Any]], prompts: int, progress: Progress) -> None:
    """Put λ, what was tried, and the seconds of the merge into every row."""
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    model = AutoModelForCausalLM.from_pretrained(HERE / "model", dtype=torch.float32).eval()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    validation = {task.name: examples(task, "validation", prompts, SEED) for task in TASKS.values()}
    adapters = {name: Adapter.from_peft(HERE / "adapters" / name) for name in TASKS}
    bar = progress.add_task("choosing λ", total=len(found))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for row in found:
            progress.update(bar, description=f"choosing λ of {row['recipe']}")
            write_recipes(Path(folder) / "one.yaml", [row])
            merged, row["seconds"] = timed_merge(row, Path(folder) / "one.yaml")
            around = sum_norm([adapters[name] for name in row["tasks"]]) / norm(merged)
            mine = [example for name in row["tasks"] for example in validation[name]]
            choice = choose(model, tokenizer, base, merged, around, mine)
            row["lambda"] = choice.lam
            row["validation"] = {str(lam): round(share, 4) for lam, share in sorted(choice.tried.items())}
            progress.advance(bar)
    progress.remove_task(bar)


async def ask(server: Server, found: list[dict[str, Any]], items: list[dict[str, str]], progress: Progress) -> None:
    """Put the accuracies through the server into every row; beside them, those of the tasks' own adapters."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        own: dict[str, float] = {}
        for task in TASKS:
            own |= await right_answers(client, task, [i for i in items if i["task"] == task], progress)
        for row in found:
            mine = [item for item in items if item["task"] in row["tasks"]]
            row["accuracy"] = {
                task: round(share, 4)
                for task, share in (await right_answers(client, row["recipe"], mine, progress)).items()
            }
            row["adapters"] = {task: round(own[task], 4) for task in row["tasks"]}
            row["kept"] = round(sum(row["accuracy"].values()) / sum(row["adapters"].values()), 4)


def table(found: list[dict[str, Any]]) -> str:
    """The rows, best first: those of all eight tasks, then those of fewer adapters."""
    names = list(TASKS)
    lines = [
        "| recipe | space | λ | kept | " + " | ".join(names) + " |",
        "|---|---|---|---|" + "---|" * len(names),
    ]
    for row in sorted(found, key=lambda row: (-len(row["tasks"]), -row["kept"], row["recipe"])):
        cells = [f"{100 * row['accuracy'][task]:.0f}" if task in row["tasks"] else "" for task in names]
        name = f"[{row['recipe']}]({row['method']}.md)"
        lines.append(f"| {name} | {row['space']} | {row['lambda']:g} | {100 * row['kept']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choices(found: list[dict[str, Any]]) -> str:
    """The rows that choosing.md shows: what each keeps, what it costs, and the rank that it gives."""
    rows = {row["recipe"]: row for row in found}
    lines = ["| for | method | kept, % | seconds | rank of the result |", "|---|---|---|---|---|"]
    for recipe, purpose in CHOICES.items():
        row = rows[recipe]
        rank = RANKS[default_registry().get(row["method"]).rank_class(row["space"])]
        method = f"[{recipe}]({row['method']}.md)"
        lines.append(f"| {purpose} | {method} | {100 * row['kept']:.1f} | {row['seconds']:g} | {rank} |")
    return "\n".join(lines)


def renewed(page: str, block: str) -> str:
    """The page with another block between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def write_pages(found: list[dict[str, Any]]) -> None:
    """Put the tables of these rows into the pages."""
    for page, block in ((PAGE, table(found)), (CHOOSING, choices(found))):
        page.write_text(renewed(page.read_text(encoding="utf-8"), block), encoding="utf-8")


def save(found: list[dict[str, Any]], prompts: int, validation: int) -> None:
    """Write the results and the pages; recipes of registered methods that were not measured now keep what they had."""
    names = {spec.name for spec in list_methods()}
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []
    new = {row["recipe"] for row in found}
    kept = [row for row in before if row["method"] in names and row["recipe"] not in new]
    measured = [{key: value for key, value in row.items() if key != "stages"} for row in found]
    results = {
        "prompts": prompts,
        "validation_prompts": validation,
        "grid": GRID,
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("vllm-merge", "torch", "transformers")},
        "rows": sorted([*kept, *measured], key=lambda row: str(row["recipe"])),
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_pages(results["rows"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every merge method on the demo.")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts of each task (50)")
    parser.add_argument("--validation", type=int, default=16, help="validation prompts of each task (16)")
    parser.add_argument("--methods", nargs="+", help="measure only these anew")
    args = parser.parse_args()
    console, started = Console(), time.monotonic()
    found = list(rows(args.methods or [spec.name for spec in list_methods()]))
    items: list[dict[str, str]] = []
    for line in (HERE / "eval.jsonl").read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if sum(other["task"] == item["task"] for other in items) < args.prompts:
            items.append(item)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        choose_all(found, args.validation, progress)
        write_recipes(Path(folder) / "methods.yaml", found)
        options = ("--max-loras", "8", "--max-lora-rank", str(MAX_RANK))
        with running(merge_serve(HERE / "model", Path(folder) / "methods.yaml", *options)) as server:
            asyncio.run(ask(server, found, items, progress))
    console.print(table(found), soft_wrap=True)
    best = max((row for row in found if len(row["tasks"]) == len(TASKS)), key=lambda row: row["kept"], default=None)
    save(found, args.prompts, args.validation)
    console.print(f"{time.monotonic() - started:.0f} s in all")
    if best is not None and best["kept"] < KEPT:
        raise SystemExit(
            f"the best, {best['recipe']}, keeps {best['kept']:.0%} of the adapters' mean, under {KEPT:.0%}"
        )


if __name__ == "__main__":
    main()
