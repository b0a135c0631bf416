# SPDX-License-Identifier: Apache-2.0
"""Every method of `vllm-merge tune` on the demo: seconds, and what is gained on prompts that nothing was learned from.

python benchmarks/tuning.py                      # all of configs/tuning; rewrites docs/tuning/index.md
python benchmarks/tuning.py --only ssr nsc       # these anew, the others as they were

A search that has a NAME-random.yaml beside its NAME.yaml is run with three seeds, and so is that random search.

Each runs the command at the head of its recipe file. Scores are of greedy answers to examples/demo/eval.jsonl, which no
prompt of validation.jsonl or safety.jsonl shares a word or sum with. CPU seconds are of one core: the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.evaluation.offline import OfflineModel
from vllm_merge.evaluation.scores import score
from vllm_merge.evaluation.tasks import read_tasks
from vllm_merge.methods.registry import default_registry
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import make_plan
from vllm_merge.recipe_files import load_recipes

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "tuning"
RESULTS = ROOT / "benchmarks" / "results" / "tuning-demo.json"
METHODS = ROOT / "benchmarks" / "results" / "demo-methods.json"
PAGE = ROOT / "docs" / "tuning" / "index.md"
EVAL = ROOT / "examples" / "demo" / "eval.jsonl"
BEGIN, END = "<!-- generated: python benchmarks/tuning.py -->", "<!-- end of generated -->"
BEGIN_RANDOM = "<!-- generated: python benchmarks/tuning.py, beside random search -->"
RANDOM, SEEDS = "-random", (0, 1, 2)
COMMAND = "#   vllm-merge "
MAX_RANK = 64
LONGEST = 20  # tokens of an answer


def command(config: Path) -> list[str]:
    """The arguments of `vllm-merge` at the head of a recipe file."""
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if line.startswith(COMMAND)]
    if len(lines) != 1:
        raise SystemExit(f"{config}: has {len(lines)} lines that begin with {COMMAND!r}; expected one")
    return shlex.split(lines[0].removeprefix(COMMAND))


def has_twin(name: str) -> bool:
    """Whether a search and the random search that it is compared with are both there."""
    searched = name.removesuffix(RANDOM)
    return all((CONFIGS / f"{one}.yaml").is_file() for one in (searched, searched + RANDOM))


def run(config: Path, output: Path, seed: int) -> dict[str, Any]:
    """The record of one run, with its seconds from the command to its end, and those of the CPU."""
    arguments = command(config)
    arguments[arguments.index("-o") + 1] = str(output)
    arguments += ["--seed", str(seed)] if seed else []
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    called = [sys.executable, "-m", "vllm_merge", *arguments, "--json"]
    ended = subprocess.run(called, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{config}: `vllm-merge {shlex.join(arguments)}` ended with {ended.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    facts: dict[str, Any] = json.loads(ended.stdout)
    facts["wall"] = time.perf_counter() - started
    facts["cpu"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return facts


class Held:
    """Scores on the held-out prompts."""

    def __init__(self) -> None:
        self._examples = read_tasks(EVAL)
        self._model = OfflineModel(str(ROOT / "examples" / "demo" / "model"), "cpu", LONGEST)
        self._known: dict[str, dict[str, float]] = {}

    def of(self, file: Path, name: str) -> dict[str, float]:
        """The share of right answers by task and their mean, in %."""
        recipes = load_recipes(file)
        hashes = {adapter: hash_adapter(entry.path) for adapter, entry in recipes.adapters.items()}
        plan = make_plan(
            recipes,
            name,
            registry=default_registry(),
            adapter_hashes=hashes,
            base_model_hash="",
            max_rank=MAX_RANK,
            dtype="float32",
        )
        if plan.digest not in self._known:
            factors = run_plan(plan, report="brief").factors
            answers = self._model.answers(factors, [e.prompt for e in self._examples], lambda done: None)
            found = score(name, "recipe", self._examples, answers)
            self._known[plan.digest] = {task: round(100 * one.accuracy, 1) for task, one in found.tasks.items()}
            self._known[plan.digest]["mean"] = round(100 * found.mean.accuracy, 2)
        return self._known[plan.digest]


def row(config: Path, held: Held) -> dict[str, Any]:
    """One line of the table, of the first seed; with all seeds where random search is compared with."""
    found = seeded(config, held, SEEDS[0])
    if has_twin(config.stem):
        found["seeds"] = [found, *(seeded(config, held, seed) for seed in SEEDS[1:])]
        found["seeds"] = [{"objective": o["objective"], "after": o["after"], "cpu": o["cpu"]} for o in found["seeds"]]
    return found


def seeded(config: Path, held: Held, seed: int) -> dict[str, Any]:
    """What one run gave."""
    with tempfile.TemporaryDirectory() as folder:
        facts = run(config, Path(folder), seed)
        (start,) = load_recipes(config).recipes
        return {
            "config": config.stem,
            "method": facts["method"],
            "per": facts["settings"]["per"],
            "command": shlex.join(command(config)),
            "data": f"{facts['data']['prompts']} prompts",
            "labels": facts["settings"]["objective"] in ("loss", "accuracy")
            and facts["method"] not in ("ssr", "regmean"),
            "steps": facts["run"]["steps"],
            "seconds": round(facts["run"]["seconds"], 1),
            "wall": round(facts["wall"], 1),
            "cpu": round(facts["cpu"], 1),
            "load": os.getloadavg()[0],
            "objective": [facts["run"]["objective"], facts["run"]["start"], facts["run"]["best"]],
            "safety": {w: facts["safety"][w]["accuracy"] for w in ("start", "learned")} if "safety" in facts else None,
            "before": held.of(config, start),
            "after": held.of(Path(folder) / "recipe.yaml", facts["name"]),
        }


def best_without_data() -> dict[str, Any]:
    """The recipe of all eight adapters that gets most right of those that learn nothing, and its mean in %."""
    rows = json.loads(METHODS.read_text(encoding="utf-8"))["rows"]
    means = {one["recipe"]: 100 * sum(one["accuracy"].values()) / 8 for one in rows if len(one["tasks"]) == 8}
    name = max(means, key=means.__getitem__)
    return {"recipe": name, "mean": means[name]}


def table(results: Mapping[str, Any]) -> str:
    """The rows as Markdown, the best first."""
    name, best = results["without_data"]["recipe"], results["without_data"]["mean"]
    lines = [
        f"| recipe | data | labels | CPU s | wall s | held out: start → learned, % | gain | beside `{name}` ({best:.1f}) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(results["rows"], key=lambda one: (-one["after"]["mean"], one["cpu"])):
        before, after = one["before"]["mean"], one["after"]["mean"]
        link = f"[{one['config']}](../../configs/tuning/{one['config']}.yaml)"
        labels = "used" if one["labels"] else "as text" if one["objective"][0] == "entropy" else "none"
        labels = "for λ" if one["method"] in ("ssr", "regmean") else labels
        lines.append(
            f"| {link} | {one['data']} | {labels} | {one['cpu']:.0f} | {one['wall']:.0f} | {before:.1f} → {after:.1f} | "
            f"{after - before:+.1f} | {after - best:+.1f} |"
        )
    return "\n".join(lines)


def beside_random(results: Mapping[str, Any]) -> str:
    """Each search beside random search as Markdown, seed by seed."""
    rows = {one["config"]: one for one in results["rows"]}
    lines = [
        "| search | value that is made small: it, random | held out: it, random, % | CPU s: it, random |",
        "|---|---|---|---|",
    ]
    for name in sorted(rows):
        if name + RANDOM not in rows:
            continue
        pairs = list(zip(rows[name]["seeds"], rows[name + RANDOM]["seeds"], strict=True))
        values = ", ".join(f"{it['objective'][2]:.3g} / {other['objective'][2]:.3g}" for it, other in pairs)
        held = ", ".join(f"{it['after']['mean']:.1f} / {other['after']['mean']:.1f}" for it, other in pairs)
        cpu = ", ".join(f"{it['cpu']:.0f} / {other['cpu']:.0f}" for it, other in pairs)
        lines.append(f"| [{name}]({name}.md) | {values} | {held} | {cpu} |")
    return "\n".join(lines)


def renewed(page: str, block: str, begin: str = BEGIN) -> str:
    """The page with another block between its markers."""
    before, rest = page.split(begin)
    return f"{before}{begin}\n{block}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="files of configs/tuning, without their ending")
    args = parser.parse_args()
    configs = sorted(CONFIGS.glob("*.yaml"))
    chosen = [config for config in configs if not args.only or config.stem in args.only]
    names = {config.stem for config in configs}
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.is_file() else []
    rows = {one["config"]: one for one in before if one["config"] in names}
    held = Held()
    for config in chosen:
        rows[config.stem] = one = row(config, held)
        print(f"{config.stem}: {one['cpu']} CPU s, {one['before']['mean']} → {one['after']['mean']}", flush=True)
        save([rows[name] for name in sorted(rows)])


def save(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the results, and the table into the page."""
    results = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "without_data": best_without_data(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = renewed(PAGE.read_text(encoding="utf-8"), table(results))
    PAGE.write_text(renewed(page, beside_random(results), BEGIN_RANDOM), encoding="utf-8")


if __name__ == "__main__":
    main()
