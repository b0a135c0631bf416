#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fuzz the readers of recipe files and adapter folders with atheris (pip install atheris): only UserInputError may come out.

    python tools/fuzz_readers.py recipe 300      # the reader, and for how many seconds
    python tools/fuzz_readers.py adapter 300

An input that takes more than 10 seconds or 2 GB, or that makes a reader raise anything else, is kept as crash-… in the
current folder, and the exit code is not 0. Recorded runs are in benchmarks/results/fuzzing.md.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["vllm_merge", "yaml"]):
    from vllm_merge.adapters.peft import hash_adapter, read_adapter, read_shapes
    from vllm_merge.errors import UserInputError
    from vllm_merge.recipe_files import load_recipes

RECIPE = b"""\
version: 1
base_model: org/base
adapters:
  sql: {path: ./adapters/sql}
  code: {path: org/code, revision: '4f2c'}
recipes:
  first: &r
    merge_method: ties
    space: delta
    adapters:
      - {adapter: sql, parameters: {weight: 0.6, density: [1, 0.7, 2e-1]}}
      - {adapter: code, parameters: {weight: [{filter: mlp, value: 0.5}, {value: .3}]}}
    parameters: {lambda: 0x1, normalize: true}
    rank: {energy: 0.99}
    precondition: [norm_cap, {norm_cap: {mads: 2}}]
    load: lazy
    seed: 7
  second: {merge_method: linear, adapters: [{adapter: first}, {adapter: sql}], rank: auto}
aliases: {assistant: second, raw: "\\u0073ql"}
"""
CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {r"^m\.q$": 2},
    "alpha_pattern": {"(q|k)+.*": 1},
}
Q = "base_model.model.m.q.lora_"
HEADER = {
    "__metadata__": {"format": "pt"},
    f"{Q}A.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    f"{Q}B.weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [16, 20]},
}
SEPARATOR = b"\n\x00\n"
WORDS = (
    *(
        "version",
        "adapters",
        "recipes",
        "aliases",
        "merge_method",
        "parameters",
        "filter",
        "value",
        "energy",
        "lossless",
    ),
    *("rank_pattern", "alpha_pattern", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "data_offsets"),
    *("base_model.model.", ".lora_A.weight", ".lora_B.weight", "F32", "F16", "BF16", "<<", "!!", "&a", "*a", "{1,"),
    *('"\\U99999999"', '"\\ud800"', "!!int 1", "? [a]", "&a [*a]", "~x/y", "0x1", "1e999", "precondition", "norm_cap"),
)

VALUES: tuple[Any, ...] = (
    *(
        0,
        -1,
        1,
        2,
        16,
        2**31,
        2**63,
        -(2**63),
        10**400,
        0.5,
        1e308,
        1e-320,
        float("nan"),
        float("inf"),
        True,
        False,
        None,
    ),
    *(
        "",
        "none",
        "pissa",
        "LORA",
        "F32",
        "BF16",
        "I64",
        "\ud800",
        "\0",
        "a" * 600,
        "(" * 200,
        "(a+)+$",
        "[",
        "{9}",
        "^$",
    ),
    *([], {}, [1], [2, 2], [0, 16], [16, 20], {"q": 2}, {"": 0}, {"(.*)*x": 2}),
)


def recipe_reader(folder: Path) -> Callable[[bytes], None]:
    """A recipe file with the input as its content; where it is right, every recipe's order too."""
    file = folder / "recipe.yaml"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        recipes = load_recipes(file)
        for name in recipes.recipes:
            recipes.stage_order(name)

    return read


def adapter_reader(folder: Path) -> Callable[[bytes], None]:
    """A PEFT folder: the input is the configuration, a separator, and the weights file without or with its length."""
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"

    def read(data: bytes) -> None:
        first, _, rest = data.partition(SEPARATOR)
        header, found, tensors = rest.partition(SEPARATOR)
        config.write_bytes(first)
        weights.write_bytes(struct.pack("<Q", len(header)) + header + tensors if found else header)
        for function in (read_shapes, hash_adapter, read_adapter):
            function(folder)

    return read


SEEDS = {
    "recipe": [RECIPE, b"version: 1\n", b"version: 1\nadapters: {a: {path: ./a}}\n"],
    "adapter": [
        json.dumps(CONFIG).encode() + SEPARATOR + json.dumps(HEADER).encode() + SEPARATOR + b"\0" * 20,
        json.dumps(CONFIG).encode() + SEPARATOR + struct.pack("<Q", 2) + b"{}",
    ],
}


def change_json(node: Any, chance: random.Random) -> Any:
    """The same data with one value or key changed at random."""
    if isinstance(node, dict) and node and chance.random() < 0.8:
        key = chance.choice(list(node))
        changed = {**node, key: change_json(node[key], chance)}
        if chance.random() < 0.2:
            changed[chance.choice((*WORDS, f"{key}.weight", f"{Q}A.x.weight"))] = changed.pop(key)
        return changed
    if isinstance(node, list) and node and chance.random() < 0.8:
        index = chance.randrange(len(node))
        return [*node[:index], change_json(node[index], chance), *node[index + 1 :]]
    return chance.choice(VALUES)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the time bytes change at random; otherwise a part that is JSON stays JSON, to get behind its parser."""
    chance = random.Random(seed)
    parts = data.split(SEPARATOR)
    index = chance.randrange(len(parts))
    try:
        changed = json.dumps(change_json(json.loads(parts[index]), chance)).encode()
    except (ValueError, RecursionError):
        return atheris.Mutate(data, max_size)
    if chance.random() < 0.5:
        return atheris.Mutate(data, max_size)
    return SEPARATOR.join([*parts[:index], changed, *parts[index + 1 :]])[:max_size]


def main() -> None:
    name, seconds = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as temporary:
        corpus, work = Path(temporary) / "corpus", Path(temporary) / "work"
        corpus.mkdir()
        work.mkdir()
        for index, seed in enumerate(SEEDS[name]):
            (corpus / f"seed{index}").write_bytes(seed)
        words = Path(temporary) / "words"
        words.write_text("".join(f"{json.dumps(word)}\n" for word in WORDS))  # libFuzzer escapes as JSON does
        reader = {"recipe": recipe_reader, "adapter": adapter_reader}[name](work)
        for seed in SEEDS[name][:1]:
            reader(seed)  # the seeds must be right, or nothing behind the first check is reached

        def one_input(data: bytes) -> None:
            try:
                reader(data)
            except UserInputError as error:
                str(error).encode()  # the message must be printable

        options = [f"-max_total_time={seconds}", f"-dict={words}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=4096"]
        mutators = {"custom_mutator": mutate} if name == "adapter" else {}
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=1", str(corpus)], one_input, **mutators)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
