# SPDX-License-Identifier: Apache-2.0
"""Base model, adapters, and what each gets right by itself. What is there already is not made again."""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.quality.bank import PROJECTIONS, Wanted, train_bank
from benchmarks.quality.base import train_base
from benchmarks.quality.records import (
    BASE,
    WEIGHTS,
    Row,
    Writer,
    identity,
    key,
    packed,
    place_of,
    read_rows,
    read_run,
    unpacked,
    write_run,
)
from benchmarks.quality.scoring import Asked, Questions, Weights, joint_norm
from benchmarks.quality.settings import Settings
from benchmarks.quality.tasks import Example, Task, answer
from vllm_merge import Adapter, LoraFactors
from vllm_merge.adapters.folders import new_folder
from vllm_merge.adapters.peft import write_adapter
from vllm_merge.training.inputs import Batch, target_layers
from vllm_merge.training.starts import Start, osrm_starts

CORPUS = "corpus.txt.xz"
STARTS, FACTS = "starts", "facts"
TRAINED = "trained.json"  # beside adapters, and beside what they start from: what they were trained with
VALID, TEST = "valid", "test"
BATCH = 16  # texts at once for OSRM
LONGEST_LABEL = 12  # tokens
CPU_TOKENS = 1024  # at once: what stays in a CPU's caches is read in half the time


@dataclass
class Bench:
    """One run: its settings, its folders (weights: large, can be made again; results: kept), the model."""

    settings: Settings
    data: Path
    weights: Path
    results: Path
    device: torch.device
    tasks: dict[str, Task]
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast

    def adapters(self, kind: str, seed: int) -> Path:
        return self.weights / "adapters" / kind / str(seed)

    def adapter(self, kind: str, seed: int, task: str) -> Path:
        return self.adapters(kind, seed) / task

    def counted(self) -> list[str]:
        """The tasks that passed the gate, as many as are merged."""
        names: list[str] = read_run(self.results)["gate"]["counted"]
        return names

    def identity(self, kind: str, seed: int) -> str:
        """Of the base and the adapters of a set and seed."""
        return identity(self.weights, place_of(kind, seed))


def opened(
    settings: Settings, data: Path, weights: Path, results: Path, device: torch.device, tasks: dict[str, Task]
) -> Bench:
    """The run in these folders; its base model is trained if it is not there."""
    if not (weights / "base").is_dir():
        with new_folder(weights / "base") as folder, repeatable(device):
            found = train_base(_corpus(data), folder, settings.base, device)
        _record(results, settings, device, {BASE: found})
    model = LlamaForCausalLM.from_pretrained(weights / "base", dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(weights / "base")
    return Bench(settings, data, weights, results, device, tasks, model, tokenizer)


def prepare_set(bench: Bench, kind: str, seeds: Sequence[int]) -> None:
    """Train the adapters of a set at these seeds, and measure each on its task; for `plain`, all tasks, and the gate.

    What is recorded of other seeds stays, wherever their weights are.
    """
    everyone = list(bench.tasks) if kind == "plain" else bench.counted()
    for seed in seeds:
        if other := trained_otherwise(bench.adapters(kind, seed), bench.settings, kind):
            raise SystemExit(other)
    missing = [(task, seed) for seed in seeds for task in everyone if not bench.adapter(kind, seed, task).is_dir()]
    if missing:
        _train(bench, kind, everyone, missing)
    _name_weights(bench, kind, seeds)
    _measure(bench, kind, everyone, seeds)
    if kind == "plain":
        _gate(bench)


def trained_otherwise(folder: Path, settings: Settings, kind: str) -> str | None:
    """What is wrong where the folder has weights of a set that were made otherwise than these settings say: asked in other
    words than those it learnt, an adapter does not show what it can."""
    path = folder / TRAINED
    if not folder.is_dir() or (path.is_file() and path.read_text(encoding="utf-8") == _training(settings, kind)):
        return None
    return f"{folder}: made with other settings or words than these; move it away to make it again"


def _training(settings: Settings, kind: str) -> str:
    """All that decides what the adapters of a set learn, as JSON."""
    tuning = asdict(settings.tuning)
    if kind != "mixed":
        del tuning["mixed"]
    words = {name: asdict(words) for name, words in settings.words.items()}
    return json.dumps({"tuning": tuning, "words": words}, indent=1) + "\n"


def _name_weights(bench: Bench, kind: str, seeds: Sequence[int]) -> None:
    """In run.json, so that rows of other weights are left out."""
    content = read_run(bench.results)
    names = {place_of(kind, seed): bench.identity(kind, seed) for seed in seeds}
    content[WEIGHTS] = {**content.get(WEIGHTS, {}), BASE: identity(bench.weights), **names}
    if BASE in content:
        content[BASE]["kept_in"] = str(kept_in(bench.weights)).removeprefix("torch.")
    write_run(bench.results, content)


def kept_in(weights: Path) -> torch.dtype:
    """The dtype of the base's file."""
    with safe_open(weights / "base" / "model.safetensors", framework="pt") as file:
        found: torch.dtype = file.get_tensor(next(iter(file.keys()))).dtype
    return found


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Train with kernels that give the same weights again, and leave the GPU's memory to others afterwards."""
    if device.type != "cuda":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.cuda.empty_cache()


def machine(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"


def _corpus(data: Path) -> Path:
    for path in (data / CORPUS, data / CORPUS.removesuffix(".xz")):
        if path.is_file():
            return path
    raise SystemExit(f"{data}: has no {CORPUS}; give --data DIR")


def _train(bench: Bench, kind: str, everyone: Sequence[str], missing: Sequence[tuple[str, int]]) -> None:
    began = time.monotonic()
    for seed in {seed for _, seed in missing}:
        folder = bench.adapters(kind, seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TRAINED).write_text(_training(bench.settings, kind), encoding="utf-8")
    starts = osrm(bench, everyone, kind) if kind.startswith("osrm") else {}
    wanted = [_wanted(bench, kind, everyone.index(task), task, seed, starts) for task, seed in missing]
    wanted.sort(
        key=lambda one: sum(len(example.text) for example in one.task.train[:200])
    )  # texts of like length together
    banks = -(-len(wanted) // bench.settings.tuning.bank)
    ends = [round(len(wanted) * index / banks) for index in range(banks + 1)]  # banks of like size
    for start, end in pairwise(ends):
        part = wanted[start:end]
        print(f"{kind}: training {', '.join(f'{one.task.name}/{one.seed}' for one in part)}", flush=True)
        with repeatable(bench.device):
            trained = train_bank(bench.model, bench.tokenizer, part, bench.settings.tuning)
        for one, factors in zip(part, trained, strict=True):
            kept = {name: LoraFactors(f.A.bfloat16(), f.B.bfloat16(), f.scaling) for name, f in factors.items()}
            write_adapter(bench.adapter(kind, one.seed, one.task.name), kept, base_model="quality-base")
    facts = {task: {"others": start.facts()["others"], "own": start.facts()["own"]} for task, start in starts.items()}
    found = {
        "adapters": len(wanted),
        "seconds": round(time.monotonic() - began, 1),
        **({"inputs": facts} if facts else {}),
    }
    _record(bench.results, bench.settings, bench.device, {f"adapters {kind}": found})


def _wanted(bench: Bench, kind: str, index: int, task: str, seed: int, starts: dict[str, Start]) -> Wanted:
    tuning = bench.settings.tuning
    if kind == "mixed":
        member = tuning.mixed[index % len(tuning.mixed)]
        rank = min(member.rank, bench.settings.base.width)
        return Wanted(bench.tasks[task], seed, rank, member.alpha, member.speed)
    directions = starts[task].directions if task in starts else {}
    return Wanted(bench.tasks[task], seed, tuning.rank, tuning.alpha, directions=directions)


def osrm(bench: Bench, names: Sequence[str], kind: str) -> dict[str, Start]:
    """The OSRM starts of these tasks, each away from all the others; the same for every seed. Kept beside the adapters."""
    folder = bench.weights / STARTS / f"{kind}-{bench.settings.tuning.rank}"
    if other := trained_otherwise(folder, bench.settings, kind):
        raise SystemExit(other)
    if not folder.is_dir():
        found = _osrm(bench, names, kind)
        with new_folder(folder) as place:
            (place / TRAINED).write_text(_training(bench.settings, kind), encoding="utf-8")
            for name, start in found.items():
                directions = {module: rows.bfloat16() for module, rows in start.directions.items()}
                facts = {"others": start.others, "own": start.own}
                save_file(directions, place / f"{name}.safetensors", metadata={FACTS: json.dumps(facts)})
    if missing := [name for name in names if not (folder / f"{name}.safetensors").is_file()]:
        raise SystemExit(f"{folder}: has no start for {', '.join(missing)}, made for other tasks; remove it")
    starts = {}
    for name in names:
        with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
            facts = json.loads(file.metadata()[FACTS])
            starts[name] = Start({module: file.get_tensor(module).float() for module in file.keys()}, **facts)  # noqa: SIM118
    return starts


def _osrm(bench: Bench, names: Sequence[str], kind: str) -> dict[str, Start]:
    rng = random.Random(0)
    batches: dict[str, list[Batch]] = {}
    for name in names:
        task = bench.tasks[name]
        chosen = rng.sample(list(task.train), min(bench.settings.tuning.samples, len(task.train)))
        texts = [task.words.prompt(example.text) + answer(task.labels[example.label]) for example in chosen]
        batches[name] = []
        for start in range(0, len(texts), BATCH):
            batch = bench.tokenizer(
                texts[start : start + BATCH], return_tensors="pt", padding=True, padding_side="right"
            )
            batches[name].append({part: batch[part].to(bench.device) for part in ("input_ids", "attention_mask")})
    layers: dict[str, nn.Linear] = target_layers(bench.model, PROJECTIONS)
    variant = "mean" if kind == "osrm-mean" else "covariance"
    return osrm_starts(bench.model, layers, batches, bench.settings.tuning.rank, variant=variant)


def asked(bench: Bench, name: str, split: str) -> Asked:
    """The validation examples that settings allow, or the tests, of a task."""
    task = bench.tasks[name]
    return Asked(validation(bench, task) if split == VALID else task.test, task.labels, task.words)


def questions(bench: Bench, wanted: Sequence[Asked]) -> Questions:
    """Packed for the bench's model."""
    most = bench.settings.tokens_at_once
    at_once = min(most, CPU_TOKENS) if bench.device.type == "cpu" else most
    return Questions(wanted, bench.tokenizer, bench.device, at_once)


def on_device(factors: Mapping[str, LoraFactors], device: torch.device) -> dict[str, LoraFactors]:
    """In float32."""
    return {
        module: LoraFactors(pair.A.to(device).float(), pair.B.to(device).float(), pair.scaling)
        for module, pair in factors.items()
    }


def validation(bench: Bench, task: Task) -> list[Example]:
    """The examples that λ is chosen on, and that merges learn from."""
    return random.Random(0).sample(list(task.valid), min(bench.settings.validation, len(task.valid)))


def _measure(bench: Bench, kind: str, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Each adapter of the set on its own task."""
    writer, done = Writer(bench.results), {key(row) for row in read_rows(bench.results)}
    weights = Weights(bench.model)
    tests = {name: questions(bench, [asked(bench, name, TEST)]) for name in names}
    for seed in seeds:
        identity = bench.identity(kind, seed)
        for name in names:
            row: Row = {"kind": "single", "weights": identity, "set": kind, "seed": seed, "task": name}
            if key(row) in done:
                continue
            adapter = Adapter.from_peft(bench.adapter(kind, seed, name))
            pairs = on_device(adapter.factors, bench.device)
            deltas = {module: pair.delta() for module, pair in pairs.items()}
            weights.set(deltas)
            row["chance"] = bench.tasks[name].chance
            row["bits"] = packed(tests[name].correct(bench.model)[0])
            row["norm"] = round(joint_norm(deltas.values()), 4)
            row["rank"] = adapter.rank
            writer.add(row)
    weights.set({})


def _gate(bench: Bench) -> None:
    """Which tasks count: those whose adapters are far enough above the base's few-shot; spares come last."""
    named = read_run(bench.results)[WEIGHTS]
    places = [place_of("plain", seed) for seed in bench.settings.seeds]
    weights = {place: named[place] for place in places if place in named}
    if read_run(bench.results).get("gate", {}).get(WEIGHTS) == weights:
        return
    singles = [row for row in read_rows(bench.results) if row["kind"] == "single" and row["set"] == "plain"]
    base_weights = identity(bench.weights)
    writer = Writer(bench.results)
    found: dict[str, dict[str, Any]] = {}
    for name, task in bench.tasks.items():
        shots, prefix = few_shot(bench, task)
        [bits] = questions(bench, [replace(asked(bench, name, TEST), prefix=prefix)]).correct(bench.model)
        row = {"kind": "base", "weights": base_weights, "task": name, "shots": shots, "chance": task.chance}
        writer.add({**row, "bits": packed(bits)})
        mine = [row for row in singles if row["task"] == name]
        single = sum(_share(row["bits"]) for row in mine) / len(mine)
        base = float(bits.mean())
        found[name] = {
            "base": round(base, 4),
            "shots": shots,
            "single": round(single, 4),
            "chance": round(task.chance, 4),
            "counts": single >= base + bench.settings.gate,
        }
    counted = [name for name, row in found.items() if row["counts"]][: bench.settings.tasks]
    _record(
        bench.results, bench.settings, bench.device, {"gate": {"tasks": found, "counted": counted, WEIGHTS: weights}}
    )


def few_shot(bench: Bench, task: Task) -> tuple[int, str]:
    """Solved examples, classes in turn, as many as leave half of the context: how many, and the text."""
    rng = random.Random(0)
    by_label = [[e for e in task.train if e.label == label] for label in range(len(task.labels))]
    for examples in by_label:
        rng.shuffle(examples)
    prefix, shots = "", 0
    longest = max(len(bench.tokenizer(task.words.prompt(e.text))["input_ids"]) for e in task.test)
    room = bench.settings.base.context - longest - LONGEST_LABEL
    for turn in range(4):
        for examples in by_label:
            if turn >= len(examples):
                continue
            shown = task.words.prompt(examples[turn].text) + answer(task.labels[examples[turn].label])
            more = f"{prefix}{shown}\n\n"
            if len(bench.tokenizer(more)["input_ids"]) <= room:
                prefix, shots = more, shots + 1
    return shots, prefix


def _share(bits: str) -> float:
    return float(unpacked(bits).mean())


def _record(results: Path, settings: Settings, device: torch.device, found: dict[str, Any]) -> None:
    """Add to run.json."""
    content = read_run(results)
    content["settings"] = asdict(settings)
    content["device"] = machine(device)
    content["versions"] = {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    for name, part in found.items():
        content[name] = {**part, **({"device": machine(device)} if name != "gate" else {})}
    write_run(results, content)
