# SPDX-License-Identifier: Apache-2.0
"""Do the best recipes, served through vLLM, get right what they get right offline?

    python -m benchmarks.quality.served --data DIR [--recipes 1] [--limit 100] [--ranks 16]

For each of the best recipes a server is started on this machine's CPU; the label that it finds likeliest after a prompt is compared, example by
example, with what was recorded offline. A CPU reads some hundred tokens a second with an adapter of rank 16, and with one of rank 128 an eighth of that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.quality.grid import LOSSLESS, parameters_of
from benchmarks.quality.records import Row, identity, place_of, read_rows, read_run, unpacked
from benchmarks.quality.scores import Bits, Family, Scores
from benchmarks.quality.tasks import Task, Words, answer, read_tasks

ROOT = Path(__file__).resolve().parents[2]
SERVED = "served.json"
AT_ONCE = 64  # prompts in a request
SLOTS = (8, 16, 32, 64, 128, 256)  # the ranks that a server makes room for
TOP = 20  # next tokens that a server tells the likelihood of
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
    """The best on validation at each rank, `count` methods of each, whose result a server of this rank takes."""
    size = len(scores.tasks)
    found: dict[str, dict[str, Best]] = {}
    for family in sorted(scores.families, key=scores.validation, reverse=True):
        lossless_fits = family.space != "delta" and stacked <= max_rank
        fits = lossless_fits if family.rank == LOSSLESS else int(family.rank) <= max_rank
        if (family.set, family.size) == ("plain", size) and fits and seed in scores.families[family]:
            found.setdefault(family.rank, {}).setdefault(family.method, _best(family, scores, seed))
    return [one for methods in found.values() for one in list(methods.values())[:count]]


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
    """Whether the label that the served model finds likeliest is the right one, (examples,).

    A label is at most as likely as its first token, so a label is only read whole while it may still be the likeliest.
    """
    endings = [[*tokenizer(answer(label))["input_ids"], tokenizer.eos_token_id] for label in task.labels]
    texts = [tokenizer(task.words.prompt(example.text))["input_ids"] for example in task.test[:limit]]
    most = np.array(
        [[first.get(ending[0], min(first.values())) for ending in endings] for first in _firsts(client, name, texts)]
    )
    known = np.full(most.shape, -np.inf)
    while (left := np.flatnonzero(known.max(1) < most.max(1))).size:
        labels = most[left].argmax(1)
        asked = [(texts[row], endings[label]) for row, label in zip(left, labels, strict=True)]
        known[left, labels] = _endings(client, name, asked)
        most[left, labels] = -np.inf
    return np.asarray(known.argmax(1) == np.array([example.label for example in task.test[:limit]]))


def _firsts(client: Any, name: str, texts: Sequence[list[int]]) -> Iterator[dict[int, float]]:
    """log p of the likeliest next tokens after each text."""
    for choice in _asked(client, name, texts, logprobs=TOP, extra_body={"return_tokens_as_token_ids": True}):
        [top] = choice.logprobs.top_logprobs
        yield {int(token.removeprefix("token_id:")): float(value) for token, value in top.items()}


def _endings(client: Any, name: str, asked: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """log p of each ending after its text."""
    choices = _asked(client, name, [text + ending for text, ending in asked], logprobs=1, echo=True)
    pairs = zip(asked, choices, strict=True)
    return [sum(c.logprobs.token_logprobs[len(text) : len(text) + len(ending)]) for (text, ending), c in pairs]


def _asked(client: Any, name: str, prompts: Sequence[list[int]], **options: Any) -> Iterator[Any]:
    """The choice of each prompt, in order."""
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        reply = client.completions.create(model=name, prompt=part, max_tokens=1, temperature=0, **options)
        yield from sorted(reply.choices, key=lambda choice: choice.index)


def asked_tasks(data: Path, settings: Mapping[str, Any]) -> list[Task]:
    """The tasks in the words that a run recorded; before words were recorded all were asked in the neutral ones."""
    words = {name: Words(**parts) for name, parts in settings.get("words", {}).items()}
    return read_tasks(data, words, settings["test"])


def same_weights(weights: Path, row: Row) -> bool:
    """Whether the weights in the folder are those that the row was measured with."""
    return identity(weights, place_of(row["set"], row["seed"])) == row["weights"]


def compare(one: Best, served: Mapping[str, Bits]) -> dict[str, Any]:
    """Both accuracies, their paired difference with its 95 % interval over examples, whether that has 0 in it, and how often
    the two agree. The interval counts one example more as different, so that few or none do not look like certainty (after
    Agresti and Min, Statistics in Medicine 24, 2005)."""
    offline = {task: unpacked(one.row["bits"][task])[: len(bits)] for task, bits in served.items()}
    gains = {task: bits.astype(float) - offline[task].astype(float) for task, bits in served.items()}
    difference = float(np.mean([gain.mean() for gain in gains.values()]))
    count = sum(map(len, served.values()))
    variance = sum(gain.var() / len(gain) for gain in gains.values()) / len(gains) ** 2
    spread = math.sqrt(variance + 1 / count**2)
    return {
        "recipe": one.name,
        "offline": round(float(np.mean([bits.mean() for bits in offline.values()])), 4),
        "served": round(float(np.mean([bits.mean() for bits in served.values()])), 4),
        "difference": round(difference, 4),
        "low": round(difference - Z * spread, 4),
        "high": round(difference + Z * spread, 4),
        "agreement": round(float(np.mean([(bits == offline[task]).mean() for task, bits in served.items()])), 4),
        "examples": count,
        "within_noise": abs(difference) <= Z * spread,
    }


def main() -> None:
    from benchmarks.quality.run import DATA, RESULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("QUALITY_DATA", DATA)), help="the tasks")
    parser.add_argument("--weights", type=Path, default=ROOT / "build" / "quality" / "full", help="base and adapters")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what was measured")
    parser.add_argument("--recipes", type=int, default=1, help="how many of the best at each rank")
    parser.add_argument("--ranks", nargs="+", help="of the results (lossless, and the usual one)")
    parser.add_argument("--limit", type=int, default=100, help="examples of each task")
    args = parser.parse_args()
    run = read_run(args.results)
    scores = Scores(read_rows(args.results), run["gate"]["counted"], run["settings"]["gate"])
    tasks = [task for task in asked_tasks(args.data, run["settings"]) if task.name in scores.tasks]
    stacked = len(tasks) * run["settings"]["tuning"]["rank"]
    best = best_recipes(scores, run["settings"]["seeds"][0], args.recipes, SLOTS[-1], stacked)
    ranks = args.ranks or [LOSSLESS, *map(str, run["settings"]["ranks"])]
    best = [one for one in best if str(one.row["rank"]) in ranks]
    if not best:
        raise SystemExit(f"no recipe of rank {' or '.join(ranks)} was measured that a server takes")
    if not same_weights(args.weights, best[0].row):
        raise SystemExit(f"{args.weights}: not the weights that were measured; unpack the parcel of that run")
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from openai import OpenAI
    from server import merge_serve, running
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.weights / "base")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and with it the server
    path = args.results / SERVED
    rows = {row["recipe"]: row for row in (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else [])}
    for one in best:
        rank = stacked if one.row["rank"] == LOSSLESS else int(one.row["rank"])
        max_rank = next(slot for slot in SLOTS if slot >= rank)
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "recipes.yaml"
            config.write_text(recipe_file(args.weights, [one], tasks), encoding="utf-8")
            with running(merge_serve(args.weights / "base", config, "--max-lora-rank", str(max_rank))) as server:
                client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
                found = {task.name: right_answers(client, tokenizer, one.name, task, args.limit) for task in tasks}
        rows[one.name] = {**compare(one, found), "weights": one.row["weights"]}
        path.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
        print(rows[one.name], flush=True)
    if not all(rows[one.name]["within_noise"] for one in best):
        raise SystemExit("served and offline differ by more than chance would have it")


if __name__ == "__main__":
    main()
