# SPDX-License-Identifier: Apache-2.0
"""An A/B test from start to promotion: three ways to merge eight adapters behind one name, and users who like right answers.

    make demo-ab

A few hundred simulated users ask `assistant` through the `openai` client and send a thumb for every answer: up for 95 % of the
right ones and 5 % of the wrong ones. In the middle the server is killed (SIGKILL) and started again. The demo ends with 1 if a
user changes arms, if the report does not name the arm that is truly better, or if it finds a difference in the A/A check.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from openai import APIConnectionError, APIStatusError, AsyncOpenAI
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from server import Server, merge_serve, start  # noqa: E402  (a neighbour of this script, not a package)

MODEL = HERE / "model"
CONFIG = HERE.parent.parent / "configs" / "ab.yaml"
EXPERIMENT, CHECK, ALIAS = "assistant-ab", "assistant-aa", "assistant"
LIKES_RIGHT, LIKES_WRONG = 0.95, 0.05
TRUTH = {"ties": "ties", "task-arithmetic": "task-arithmetic", "weighted": "weighted"}  # arm -> the recipe it serves
TOKEN = "demo-admin-token"
AT_ONCE = 24
START_SECONDS = 300.0
RETRY_SECONDS = START_SECONDS + 120.0  # how long a user goes on trying while the server is away


class Place:
    """The server, which dies once and comes back at another port."""

    def __init__(self, folder: Path) -> None:
        self._command = merge_serve(MODEL, CONFIG, "--max-loras", "4", "--max-lora-rank", "64")
        self._environment = {"VLLM_MERGE_STORE": str(folder / "store.sqlite"), "VLLM_MERGE_ADMIN_TOKEN": TOKEN}
        self.environment = {**os.environ, **self._environment}
        self.server: Server | None = None
        self._client: AsyncOpenAI | None = None
        self._up = asyncio.Event()

    async def start(self) -> None:
        self.server = start(self._command, self._environment)
        await asyncio.to_thread(self.server.wait, START_SECONDS)
        self._client = AsyncOpenAI(base_url=f"{self.server.url}/v1", api_key="none", timeout=120, max_retries=0)
        self._up.set()

    def kill(self) -> None:
        """SIGKILL for every process of the server at once."""
        assert self.server is not None
        self._up.clear()
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()

    async def client(self) -> AsyncOpenAI:
        """A client of the server that runs now, or will."""
        await self._up.wait()
        assert self._client is not None
        return self._client


class Crowd:
    """The users. Everything that they do is drawn from their own seed, so that every run is the same."""

    def __init__(self, place: Place, items: list[dict[str, str]], prompts: int) -> None:
        self._place, self._items, self._prompts = place, items, prompts
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.arms: dict[str, dict[str, set[str]]] = {EXPERIMENT: defaultdict(set), CHECK: defaultdict(set)}
        self.answers = 0
        self.repeated = 0

    async def visit(self, user: str, model: str, visit: int) -> None:
        """One user asks one model some questions, and says of each answer whether it was liked."""
        rng = random.Random(f"{user} {model} {visit}")
        for item in rng.sample(self._items, self._prompts):
            async with self._gate:
                answer_id, arm, right = await self._ask(user, model, item)
                self.arms[EXPERIMENT if model == ALIAS else model][user].add(arm)
                thumb = "up" if rng.random() < (LIKES_RIGHT if right else LIKES_WRONG) else "down"
                await self._again(lambda client, i=answer_id, t=thumb: self._tell(client, i, t))

    async def _ask(self, user: str, model: str, item: dict[str, str]) -> tuple[str, str, bool]:
        async def ask(client: AsyncOpenAI) -> tuple[str, str, bool]:
            reply = await client.completions.with_raw_response.create(
                model=model, prompt=item["prompt"], max_tokens=24, temperature=0, stop=["\n"], user=user
            )
            answer = reply.parse()
            self.answers += 1
            return answer.id, reply.headers["x-vllm-merge-arm"], answer.choices[0].text.strip() == item["answer"]

        return await self._again(ask)

    async def _tell(self, client: AsyncOpenAI, answer_id: str, thumb: str) -> None:
        await client.post("/merge/outcomes", body={"response_id": answer_id, "thumb": thumb}, cast_to=dict[str, Any])

    async def _again(self, call: Any) -> Any:
        """Call until it works: a user whose server is gone comes back."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                return await call(await self._place.client())
            except (APIConnectionError, APIStatusError) as error:
                wrong = isinstance(error, APIStatusError) and error.status_code < 500
                if wrong or time.monotonic() > deadline:
                    raise
            self.repeated += 1
            await asyncio.sleep(0.5)


async def accuracy(place: Place, items: list[dict[str, str]]) -> dict[str, float]:
    """The truth: how many of all prompts each arm's recipe gets right, asked for by its own name."""
    gate = asyncio.Semaphore(AT_ONCE)
    client = await place.client()

    async def right(recipe: str, item: dict[str, str]) -> bool:
        async with gate:
            answer = await client.completions.create(
                model=recipe, prompt=item["prompt"], max_tokens=24, temperature=0, stop=["\n"]
            )
        return answer.choices[0].text.strip() == item["answer"]

    found = {}
    for arm, recipe in TRUTH.items():
        hits = await asyncio.gather(*(right(recipe, item) for item in items))
        found[arm] = sum(hits) / len(hits)
    return found


def command(place: Place, *arguments: str, quiet: bool = False) -> str:
    """Run `vllm-merge experiment …` as a person would."""
    result = subprocess.run(
        [sys.executable, "-m", "vllm_merge", "experiment", *arguments],
        env=place.environment,
        capture_output=quiet,
        text=True,
        check=True,
    )
    return result.stdout or ""


async def run(console: Console, users: int, prompts: int, folder: Path) -> int:
    items = [json.loads(line) for line in (HERE / "eval.jsonl").read_text().splitlines()]
    place = Place(folder)
    console.print("Starting the server: three arms are merged and kept in memory before it answers.")
    await place.start()
    try:
        return await measured(console, place, items, users, prompts)
    finally:
        if place.server is not None:
            place.server.stop()


async def measured(console: Console, place: Place, items: list[dict[str, str]], users: int, prompts: int) -> int:
    crowd = Crowd(place, items, prompts)
    names = [f"user-{i}" for i in range(users)]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True)
    with bar as progress:
        counter = progress.add_task(f"{users} users ask and judge", total=2 * users)

        async def visit(name: str, model: str, number: int) -> None:
            await crowd.visit(name, model, number)
            progress.advance(counter)

        visits = [asyncio.create_task(visit(name, model, 0)) for name in names for model in (ALIAS, CHECK)]
        while sum(task.done() for task in visits) < len(visits) // 2:
            await asyncio.sleep(0.1)
        place.kill()  # while requests are running
        progress.console.print("kill -9 of the whole server, in the middle of requests; it is started again.")
        await place.start()
        await asyncio.gather(*visits)
        returning = names[: min(30, users)]
        counter = progress.add_task("the first users come again", total=len(returning))
        await asyncio.gather(*(visit(name, ALIAS, 1) for name in returning))
        counter = progress.add_task("how good the arms truly are", total=1)
        truth = await accuracy(place, items)
    return judge(console, place, crowd, truth)


def judge(console: Console, place: Place, crowd: Crowd, truth: dict[str, float]) -> int:
    """Print what was found, and promote the winner. Returns the exit status."""
    wanderers = [user for units in crowd.arms.values() for user, arms in units.items() if len(arms) > 1]
    console.print(f"\n{crowd.answers} answers; {crowd.repeated} calls were made again around the kill.")
    console.print(
        "Truly right answers: " + ", ".join(f"{arm} {100 * share:.1f} %" for arm, share in truth.items()) + "\n"
    )
    command(place, "report", EXPERIMENT)
    found = json.loads(command(place, "report", EXPERIMENT, "--json", quiet=True))
    console.print()
    command(place, "report", CHECK)
    check = json.loads(command(place, "report", CHECK, "--json", quiet=True))
    exposures = sum(arm["requests"] for facts in (found, check) for arm in facts["arms"])
    console.print(f"\n{exposures} exposures of {crowd.answers} answers are in the store.")
    best = max(truth, key=lambda arm: truth[arm])
    named, difference = found["verdict"], check["primary"]["differences"][0]["state"]
    results = {
        "every user kept the arm, over the kill": not wanderers,
        f"the report names the arm that is truly better, {best}": (named["advice"], named["arm"]) == ("promote", best),
        "the A/A check finds nothing": difference == "unknown" and not check["imbalance"]["mismatch"],
    }
    if named["advice"] == "promote":
        assert place.server is not None
        command(place, "promote", EXPERIMENT, named["arm"], "--server", place.server.url, "--reason", "make demo-ab")
    console.print()
    for what, good in results.items():
        console.print(f"{'yes' if good else 'NO '}  {what}")
    return 0 if all(results.values()) else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=360)
    parser.add_argument("--prompts", type=int, default=4, help="questions of each user to each experiment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vllm-merge-ab-") as folder:
        sys.exit(asyncio.run(run(Console(), options.users, options.prompts, Path(folder))))


if __name__ == "__main__":
    main()
