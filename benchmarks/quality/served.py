# SPDX-License-Identifier: Apache-2.0
"""Do the best recipes, served through vLLM, get right what they get right offline?

    python -m benchmarks.quality.served --data DIR [--recipes 3] [--limit 100]

A server is started on this machine's CPU with the best recipes; it is asked for the likelihood of every label after every prompt, and what it finds
likeliest is compared, example by example, with what was recorded offline.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.quality.grid import LOSSLESS, parameters_of
from benchmarks.quality.records import Row, identity, place_of, read_rows, read_run, unpacked
from benchmarks.quality.scores import Bits, Family, Scores
from benchmarks.quality.tasks import Task, answer, prompt, read_tasks

ROOT = Path(__file__).resolve().parents[2]
SERVED = "served.json"
AT_ONCE = 64  # prompts in a request
Z = 1.96


@dataclass(frozen=True)
class Best:
    """A recipe to serve: its name, and the row that it was measured in."""

    name: str
    row: Row

    def recipe(self) -> dict[str, Any]:
        """As a recipe file has it."""
        row = self.row
        parameters = parameters_of(row["method"], row["rank"], row["lambda"], row["density"])
        return {
            "merge_method": self.row["method"],
            "space": self.row["space"],
            "adapters": [{"adapter": task} for task in self.row["tasks"]],
            "parameters": parameters,
            "rank": self.row["rank"],
            "seed": self.row["seed"],
            "load": "eager",
        }


def best_recipes(scores: Scores, seed: int, count: int, max_rank: int, stacked: int) -> list[Best]:
    """The best on validation, one for each method and rank, whose result a server of this rank takes."""
    size, found = len(scores.tasks), {}
    for family in sorted(scores.families, key=scores.validation, reverse=True):
        lossless_fits = family.space != "delta" and stacked <= max_rank
        fits = lossless_fits if family.rank == LOSSLESS else int(family.rank) <= max_rank
        if (family.set, family.size) == ("plain", size) and fits and seed in scores.families[family]:
            found.setdefault((family.method, family.rank), _best(family, scores, seed))
    return list(found.values())[:count]


def _best(family: Family, scores: Scores, seed: int) -> Best:
    [row] = scores.families[family][seed]
    return Best(f"{family.method}-{family.space}-{family.rank}".replace("_", "-"), row)


def recipe_file(weights: Path, best: Sequence[Best], tasks: Sequence[Task]) -> str:
    """The YAML that is served."""
    folder = weights.resolve() / "adapters" / "plain" / str(best[0].row["seed"])
    content = {
        "version": 1,
        "base_model": str(weights.resolve() / "base"),
        "adapters": {task.name: {"path": str(folder / task.name)} for task in tasks},
        "recipes": {one.name: one.recipe() for one in best},
    }
    return yaml.safe_dump(content, sort_keys=False)


def right_answers(client: Any, tokenizer: Any, name: str, task: Task, limit: int) -> Bits:
    """Whether the label that the served model finds likeliest is the right one, (examples,)."""
    endings = [[*tokenizer(answer(label))["input_ids"], tokenizer.eos_token_id] for label in task.labels]
    texts = [tokenizer(prompt(example.text))["input_ids"] for example in task.test[:limit]]
    asked = [(text + ending, len(ending)) for text in texts for ending in endings]
    scores: list[float] = []
    for start in range(0, len(asked), AT_ONCE):
        part = asked[start : start + AT_ONCE]
        reply = client.completions.create(
            model=name, prompt=[ids for ids, _ in part], echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        choices = sorted(reply.choices, key=lambda choice: choice.index)
        for (ids, count), choice in zip(part, choices, strict=True):
            scores.append(sum(choice.logprobs.token_logprobs[len(ids) - count : len(ids)]))
    likeliest = np.array(scores).reshape(len(texts), len(endings)).argmax(1)
    return np.asarray(likeliest == np.array([example.label for example in task.test[:limit]]))


def same_weights(weights: Path, row: Row) -> bool:
    """Whether the weights in the folder are those that the row was measured with."""
    return identity(weights, place_of(row["set"], row["seed"])) == row["weights"]


def compare(one: Best, served: Mapping[str, Bits]) -> dict[str, Any]:
    """Both accuracies, how often the two agree, and whether they differ by more than chance would have it."""
    offline = {task: unpacked(one.row["bits"][task])[: len(bits)] for task, bits in served.items()}
    gains = {task: bits.astype(float) - offline[task].astype(float) for task, bits in served.items()}
    difference = float(np.mean([gain.mean() for gain in gains.values()]))
    spread = math.sqrt(sum(gain.var() / len(gain) for gain in gains.values())) / len(gains)
    return {
        "recipe": one.name,
        "offline": round(float(np.mean([bits.mean() for bits in offline.values()])), 4),
        "served": round(float(np.mean([bits.mean() for bits in served.values()])), 4),
        "agreement": round(float(np.mean([(bits == offline[task]).mean() for task, bits in served.items()])), 4),
        "examples": sum(map(len, served.values())),
        "within_noise": abs(difference) <= Z * spread + 1e-9,
    }


def main() -> None:
    from benchmarks.quality.run import DATA, RESULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUALITY_DATA", DATA)), help="the tasks")
    parser.add_argument("--weights", type=Path, default=ROOT / "build" / "quality" / "full", help="base and adapters")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what was measured")
    parser.add_argument("--recipes", type=int, default=3, help="how many of the best")
    parser.add_argument("--limit", type=int, default=100, help="examples of each task")
    args = parser.parse_args()
    run = read_run(args.results)
    scores = Scores(read_rows(args.results), run["gate"]["counted"])
    tasks = [task for task in read_tasks(args.data, run["settings"]["test"]) if task.name in scores.tasks]
    stacked = len(tasks) * run["settings"]["tuning"]["rank"]
    max_rank = next(rank for rank in (8, 16, 32, 64, 128, 256) if rank >= min(stacked, 256))
    best = best_recipes(scores, run["settings"]["seeds"][0], args.recipes, max_rank, stacked)
    if not same_weights(args.weights, best[0].row):
        raise SystemExit(f"{args.weights}: not the weights that were measured; unpack the parcel of that run")
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from openai import OpenAI
    from server import merge_serve, running
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.weights / "base")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "recipes.yaml"
        config.write_text(recipe_file(args.weights, best, tasks), encoding="utf-8")
        options = ("--max-loras", str(len(best)), "--max-lora-rank", str(max_rank))
        with running(merge_serve(args.weights / "base", config, *options)) as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
            rows = [
                compare(
                    one, {task.name: right_answers(client, tokenizer, one.name, task, args.limit) for task in tasks}
                )
                for one in best
            ]
    (args.results / SERVED).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)
    if not all(row["within_noise"] for row in rows):
        raise SystemExit("served and offline differ by more than chance would have it")


if __name__ == "__main__":
    main()
