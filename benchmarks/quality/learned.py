# SPDX-License-Identifier: Apache-2.0
"""The methods of `vllm-merge tune` on the same adapters, validation examples and tests as the merges that learn nothing.

    python -m benchmarks.quality.learned --data DIR [--seconds 300] [--jobs 3]

Each begins with the best task arithmetic of all tasks that `benchmarks.quality.run` found (AdaMerging++ with TIES in KnOTS
coordinates), learns from the validation examples, and is measured as the recipe that `tune` writes: lossless and cut to
rank 16, λ chosen on validation with as many trials as any other merge has. What is measured already is not learned again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.quality.grid import LOSSLESS
from benchmarks.quality.learning import METHODS
from benchmarks.quality.prepare import Bench, machine, trained_otherwise, validation
from benchmarks.quality.records import Row, Writer, key, read_rows
from benchmarks.quality.run import Places, places_of, record_call, with_options
from benchmarks.quality.scoring import joint_norm
from benchmarks.quality.served import Best
from benchmarks.quality.sweep import TRIALS, Sweep
from benchmarks.quality.tasks import answer
from vllm_merge import Adapter, MergeError, merge
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan, make_plan
from vllm_merge.recipe_files import load_recipes
from vllm_merge.tuning.data import read_prompts
from vllm_merge.tuning.methods import Settings, tune_method
from vllm_merge.tuning.record import Request
from vllm_merge.tuning.tune import tune

LABELLED = ("lorahub", "enmp")  # the others get prompts alone
SUM, TIES = ("task_arithmetic", "core"), ("ties", "knots")
START = "start"
FACTORS = [float(value) for value in np.geomspace(0.5, 2, TRIALS)]  # of what was learned; the middle one is 1


@dataclass(frozen=True)
class Wanted:
    """One run of a learner, and the merge that it begins with."""

    method: str
    start: Row

    def row(self, rank: int | str) -> Row:
        """The start of its row."""
        mine = {name: self.start[name] for name in ("set", "seed", "tasks")}
        return {"kind": "learned", **mine, "method": self.method, "rank": rank}


def wanted(rows: Sequence[Row], tasks: Sequence[str], seeds: Sequence[int], methods: Sequence[str]) -> list[Wanted]:
    """All runs, seed by seed. Raises SystemExit where the merge to begin with was not measured."""
    starts = {
        (row["seed"], row["method"], row["space"]): row
        for row in rows
        if row["kind"] == "merge" and "error" not in row
        if (row["set"], row["rank"], row["tasks"]) == ("plain", LOSSLESS, list(tasks))
    }
    found = []
    for seed in seeds:
        for method in methods:
            start = starts.get((seed, *(TIES if method == "adamerging++" else SUM)))
            if start is None:
                raise SystemExit(
                    f"{method} begins with a merge of seed {seed} that is not measured; run benchmarks.quality.run"
                )
            found.append(Wanted(method, start))
    return found


def learn(places: Places, left: Sequence[Wanted], seconds: float, name: str, jobs: int = 1) -> int:
    """Run learners in order for so many seconds; how many were measured. jobs: how many share the device."""
    until, done = time.monotonic() + seconds, 0
    torch.set_num_threads(places.threads)
    bench = places.open()
    sweep, writer = Sweep(bench), Writer(places.results, name)
    for one in left:
        if time.monotonic() >= until:
            break
        try:
            for row in learned(bench, sweep, one):
                writer.add({**row, "jobs": jobs})
        except MergeError as error:
            print(f"{one.method}, seed {one.start['seed']}: {error}", flush=True)
            continue
        done += 1
    return done


def learned(bench: Bench, sweep: Sweep, one: Wanted) -> list[Row]:
    """The rows of one run, one for each rank. Raises MergeError."""
    kind, seed = one.start["set"], one.start["seed"]
    if other := trained_otherwise(bench.adapters(kind, seed), bench.settings, kind):
        raise MergeError(other)
    if bench.identity(kind, seed) != one.start["weights"]:
        raise MergeError(
            f"{bench.weights}: its weights are not those of the recorded merges; run benchmarks.quality.run"
        )
    settings, folder = bench.settings, bench.weights / "learned" / str(seed) / one.method
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "start.yaml").write_text(start_file(bench, one), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(
        prompt_lines(bench, one.start["tasks"], one.method in LABELLED), encoding="utf-8"
    )
    method, given = tune_method(one.method), settings.learning
    steps = {"gradient": given.gradients, "search": given.generations, "regression": None}[method.kind]
    request = Request(
        load_recipes(folder / "start.yaml"),
        plan_of(folder / "start.yaml", START),
        str(bench.weights / "base"),
        Settings(
            method,
            steps=steps,
            of_each=given.prompts,
            rate=given.rate,
            seed=seed,
            answer_tokens=given.answer_tokens,
        ).checked(),
        read_prompts(folder / "prompts.jsonl"),
        None,
        None,
        folder / "learned",
        str(bench.device),
    )
    began = time.perf_counter()
    result = tune(request, replan=plan_of, notify=lambda what, done, total: None, stopped=lambda: False)
    seconds = time.perf_counter() - began - result.facts["seconds_of_scoring"]
    run, plan = result.facts["run"], plan_of(result.recipe, result.facts["name"])
    rows = []
    ranks: tuple[int | str, ...] = (LOSSLESS, *settings.ranks)
    for rank in ranks:
        stage = plan.stages[-1].model_copy(update={"rank": rank})
        cut = plan.model_copy(update={"stages": (*plan.stages[:-1], stage)})
        merged = run_plan(cut, device=bench.device, report="brief")
        deltas = {module: merged.delta(module) for module in merged.factors}
        found = sweep.judged(one.start["tasks"], deltas, FACTORS)
        about = {name: run[name] for name in ("objective", "start", "best", "best_step", "steps")}
        labels = one.method in LABELLED
        row = {**one.row(rank), "weights": one.start["weights"], "seconds": round(seconds, 2), "labels": labels}
        row["device"] = machine(bench.device)
        rows.append({**row, "run": about, "notes": result.facts["notes"], **found})
    print(f"{one.method}, seed {one.start['seed']}: {seconds:.0f} s, validation {rows[0]['validation']}", flush=True)
    return rows


def start_file(bench: Bench, one: Wanted) -> str:
    """The recipe that is learned from, as YAML."""
    row, folder = one.start, bench.weights.resolve() / "adapters" / one.start["set"] / str(one.start["seed"])
    recipe = Best(START, row).recipe()
    if one.method == "adamerging++":  # which learns the weights of a sum: as large as the mean that was measured
        recipe["parameters"] |= {"normalize": False, "lambda": row["lambda"] * _mean_beside_sum(bench, row)}
    content = {
        "version": 1,
        "base_model": str(bench.weights.resolve() / "base"),
        "adapters": {task: {"path": str(folder / task)} for task in row["tasks"]},
        "recipes": {START: recipe},
    }
    return yaml.safe_dump(content, sort_keys=False)


def _mean_beside_sum(bench: Bench, row: Row) -> float:
    """‖ΔW‖ of TIES with the mean of the tasks that agree, over that with their sum."""
    adapters = [Adapter.from_peft(bench.adapter(row["set"], row["seed"], task)) for task in row["tasks"]]
    norms = []
    for normalize in (True, False):
        parameters = {"density": row["density"], "normalize": normalize}
        merged = merge(
            adapters,
            merge_method=row["method"],
            space=row["space"],
            parameters=parameters,
            rank=LOSSLESS,
            device=bench.device,
            report="brief",
        )
        norms.append(joint_norm(merged.delta(module) for module in merged.factors))
    return norms[0] / norms[1]


def prompt_lines(bench: Bench, tasks: Sequence[str], labelled: bool) -> str:
    """The validation examples of the tasks as `vllm-merge tune` reads them."""
    lines = []
    for name in tasks:
        task = bench.tasks[name]
        for example in validation(bench, task):
            line = {"prompt": task.words.prompt(example.text), "task": name}
            if labelled:
                line["answer"] = answer(task.labels[example.label])
            lines.append(json.dumps(line, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def plan_of(path: Path, name: str) -> Plan:
    """The plan of a recipe of a file, float32, of any rank."""
    recipes = load_recipes(path)
    hashes = {adapter: hash_adapter(entry.path) for adapter, entry in recipes.adapters.items()}
    options: dict[str, Any] = {"base_model_hash": "", "max_rank": None, "dtype": "float32"}
    return make_plan(recipes, name, registry=default_registry(), adapter_hashes=hashes, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with_options(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    args = parser.parse_args()
    began, places = time.monotonic(), places_of(args)
    bench, rows = places.open(), read_rows(places.results)
    found = {key(row) for row in rows}
    everything = wanted(rows, bench.counted(), args.seeds or places.settings.seeds, args.methods)
    left = [one for one in everything if key(one.row(LOSSLESS)) not in found]
    seconds = args.seconds - (time.monotonic() - began)
    jobs = min(args.jobs, len(left))
    if jobs <= 1:
        done = learn(places, left, seconds, "rows-learned")
    else:
        del bench
        work = [(places, left[index::jobs], seconds, f"rows-learned-{index}", jobs) for index in range(jobs)]
        with multiprocessing.get_context("spawn").Pool(jobs, places.take_gpu) as pool:
            done = sum(pool.starmap(learn, work, chunksize=1))
    record_call(places, "learners", began, max(1, jobs), done)
    print(f"learned {done} of {len(left)}; {len(everything) - len(left)} were there", flush=True)


if __name__ == "__main__":
    main()
