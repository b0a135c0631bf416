# SPDX-License-Identifier: Apache-2.0
"""The demo: serve the recipes of configs/demo.yaml on the CPU, ask them through the `openai` client, print what is right.

    make demo

Every number is the share of held-out prompts that the running server answered exactly: by the base model, by the task's
own adapter, and by each recipe, which is one model for all tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import yaml
from openai import AsyncOpenAI
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from server import Server, merge_serve, running  # noqa: E402  (a neighbour of this script, not a package)

MODEL = HERE / "model"
CONFIG = HERE.parent.parent / "configs" / "demo.yaml"
AT_ONCE = 32


async def right_answers(
    client: AsyncOpenAI, model: str, items: list[dict[str, str]], progress: Progress
) -> dict[str, float]:
    """{task: share of prompts that `model` answers exactly}."""
    task_id = progress.add_task(model, total=len(items))
    gate = asyncio.Semaphore(AT_ONCE)
    hits: dict[str, list[bool]] = defaultdict(list)

    async def ask(item: dict[str, str]) -> None:
        async with gate:
            answer = await client.completions.create(
                model=model, prompt=item["prompt"], max_tokens=24, temperature=0, stop=["\n"]
            )
        hits[item["task"]].append(answer.choices[0].text.strip() == item["answer"])
        progress.advance(task_id)

    await asyncio.gather(*(ask(item) for item in items))
    progress.remove_task(task_id)
    return {task: sum(results) / len(results) for task, results in hits.items()}


async def ask_everything(
    server: Server, items: list[dict[str, str]], progress: Progress
) -> dict[str, dict[str, float]]:
    """{column: {task: accuracy}}: the base, every task's own adapter ("own"), and every recipe the server lists."""
    tasks = list(dict.fromkeys(item["task"] for item in items))
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:
        recipes = (await client.get("/merge/recipes", cast_to=dict[str, list[dict[str, str]]]))["data"]
        columns = {"base": await right_answers(client, str(MODEL), items, progress), "own": {}}
        for task in tasks:
            own = [item for item in items if item["task"] == task]
            columns["own"] |= await right_answers(client, task, own, progress)
        for row in recipes:
            if row["kind"] == "recipe":
                columns[row["name"]] = await right_answers(client, row["name"], items, progress)
    return columns


async def move_an_alias(server: Server, config: Path) -> list[str]:
    """Point the alias `assistant` to another recipe while the server runs, then write a mistake; what was seen of it."""
    seen = []
    document = yaml.safe_load(config.read_text())
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as client:

        async def answered() -> str:
            answer = await client.completions.create(
                model="assistant", prompt="sort: stone ->", max_tokens=8, stop=["\n"]
            )
            return f"assistant is {answer.model} and says {answer.choices[0].text.strip()!r}"

        async def write(text: str) -> dict[str, str]:
            before = await client.get("/merge/recipes", cast_to=dict)
            config.write_text(text)
            for _ in range(100):
                await asyncio.sleep(0.2)
                after = await client.get("/merge/recipes", cast_to=dict)
                if after["file"] != before["file"]:
                    return dict(after["file"])
            raise RuntimeError("the server did not look at its changed recipe file")

        seen.append(await answered())
        document["aliases"]["assistant"] = "knots-ties"
        await write(yaml.safe_dump(document, sort_keys=False))
        seen.append("after a change of the recipe file: " + await answered())
        document["aliases"]["assistant"] = "knots-tie"
        refused = await write(yaml.safe_dump(document, sort_keys=False))
        seen.append("after a change with a mistake, nothing moves; the server says: " + refused["error"])
    return seen


def table(columns: dict[str, dict[str, float]]) -> Table:
    """A row per task, then the mean."""
    shown = Table(title="Right answers through the server, % of held-out prompts", box=None, pad_edge=False)
    shown.add_column("task", no_wrap=True)
    for name in columns:
        shown.add_column(name.replace("-", "-\n").replace(" ", "\n"), justify="right", no_wrap=True)
    for task in columns["base"]:
        shown.add_row(task, *(f"{100 * column[task]:.0f}" for column in columns.values()))
    shown.add_row()
    means = [sum(column.values()) / len(column) for column in columns.values()]
    shown.add_row("mean", *(f"{100 * mean:.1f}" for mean in means), style="bold")
    return shown


def examples(items: list[dict[str, str]]) -> Table:
    """One prompt and its answer for each task."""
    shown = Table(title="The tasks", show_header=False)
    for item in {item["task"]: item for item in items}.values():
        shown.add_row(item["prompt"], item["answer"])
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the demo's recipes and print what each gets right.")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts of each task")
    limit = parser.parse_args().prompts
    console = Console()
    items: list[dict[str, str]] = []
    for line in (HERE / "eval.jsonl").read_text().splitlines():
        item = json.loads(line)
        if sum(other["task"] == item["task"] for other in items) < limit:
            items.append(item)
    console.print(examples(items))
    config = Path(tempfile.mkdtemp(prefix="vllm-merge-demo-")) / CONFIG.name
    config.write_text(CONFIG.read_text().replace("../examples/demo", str(HERE)))
    started = time.monotonic()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed}/{task.total}"), console=console
    ) as progress:
        starting = progress.add_task("starting a vLLM server on the CPU (half a minute)", total=None)
        command = merge_serve(MODEL, config, "--max-loras", "8")
        with running(command, tick=lambda seconds: progress.update(starting, completed=int(seconds))) as server:
            progress.remove_task(starting)
            ready = time.monotonic() - started
            columns = asyncio.run(ask_everything(server, items, progress))
            moves = asyncio.run(move_an_alias(server, config))
    console.print(table(columns))
    for line in moves:
        console.print(line.replace(str(config.parent) + "/", ""), highlight=False)
    console.print(
        f"Server ready after {ready:.0f} s, {time.monotonic() - started:.0f} s in all. "
        f"Recipes: configs/{CONFIG.name}. Your own adapters: README.md."
    )


if __name__ == "__main__":
    main()
