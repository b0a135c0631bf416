# SPDX-License-Identifier: Apache-2.0
"""Files made to hurt: giant headers, absurd shapes, documents that blow up, recipes of 10,000 adapters. Each is refused, or
read, within little memory, and the message says what is allowed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_merge.adapters.peft import hash_adapter, read_adapter, read_shapes
from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.plan import Plan, make_plan
from vllm_merge.recipe_files import load_recipes

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
LITTLE = 256 << 20  # bytes; 16 MiB of JSON are some ten times that as objects


def message_of(call: Callable[[], Any]) -> str | None:
    """What a call is refused with; None if it is not."""
    try:
        call()
    except MergeError as refused:
        return str(refused)
    return None


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails if more than LITTLE was resident at once beside what was before."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    yield
    assert (kilobytes("VmHWM") - before) << 10 < LITTLE


def kilobytes(what: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1])


def test_much_memory_would_be_seen():
    with pytest.raises(AssertionError), little_memory():
        assert b"x" * (2 * LITTLE)


def adapter(folder: Path, header: Any, data: bytes = b"", length: int | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / "adapter_model.safetensors").write_bytes(prefix + text + data)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}))
    return folder


def tensor(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def named(shape: list[int], end: int = 64) -> dict[str, Any]:
    return {f"{MODULE}.lora_A.weight": tensor(shape, 0, end)}


HEADERS: dict[str, tuple[Any, bytes, int | None]] = {
    "length of 2^64 - 1": ({}, b"", 2**64 - 1),
    "length of 2^63": ({}, b"", 2**63),
    "length of a terabyte": ({}, b"", 2**40),
    "length beyond the file": ({}, b"", 1000),
    "more than 16 MiB": (b" " * (16 * 2**20 + 1), b"", None),
    "20,000 tensors of nothing": ({f"t{i}": tensor([0], 0, 0) for i in range(20_000)}, b"", None),
    "nested": (b'{"a":' * 100_000, b"", None),
    "a number of a million digits": (b'{"a": {"shape": [1' + b"0" * 1_000_000 + b"]}}", b"", None),
    "a dimension of 2^62": (named([2**62, 4]), bytes(64), None),
    "a product of 2^512": (named([2**63] * 8), bytes(64), None),
    "a product that wraps around to 64 bytes": (named([2**62 + 4, 4]), bytes(64), None),
    "a thousand dimensions": (named([1] * 1000, 4), bytes(4), None),
    "a negative dimension": (named([-4, -4]), bytes(64), None),
    "a dimension that is true": (named([True, 16]), bytes(64), None),  # type: ignore[list-item]
    "bytes that end before they begin": ({f"{MODULE}.lora_A.weight": tensor([4, 4], 64, 0)}, bytes(64), None),
    "bytes before the file": ({f"{MODULE}.lora_A.weight": tensor([4, 4], -64, 0)}, bytes(64), None),
    "two tensors in the same bytes": (
        {f"{MODULE}.lora_A.weight": tensor([4, 4], 0, 64), f"{MODULE}.lora_B.weight": tensor([4, 4], 0, 64)},
        bytes(64),
        None,
    ),
    "a name of a megabyte": ({"x" * 1_000_000: tensor([4, 4], 0, 64)}, bytes(64), None),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case, tmp_path):
    header, data, length = HEADERS[case]
    folder = adapter(tmp_path / "a", header, data, length)
    for read in (read_adapter, read_shapes):
        with little_memory(), pytest.raises(UserInputError) as refused:
            read(folder)
        assert str(folder) in str(refused.value)
        assert len(str(refused.value)) < 2000, "however long what was found"
    assert len(hash_adapter(folder)) == 64, "a hash believes nothing"


CONFIGS: dict[str, dict[str, Any]] = {
    "rank of 2^40": {"r": 2**40},
    "rank of 65,537": {"r": 65_537},
    "alpha of 400 digits": {"lora_alpha": 10**400},
    "a pattern that backtracks for ever": {"rank_pattern": {"(a+)+$": 4, "(a|a)*b": 4}, "target_modules": ["a" * 500]},
    "20,000 patterns": {"rank_pattern": {f"layers.{i}.q": 4 for i in range(20_000)}},
    "a rank of every module that is not its own": {"rank_pattern": {"q_proj": 9}},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configurations(case, tmp_path):
    header = {f"{MODULE}.lora_A.weight": tensor([4, 4], 0, 64), f"{MODULE}.lora_B.weight": tensor([4, 4], 64, 128)}
    folder = adapter(tmp_path / "a", header, bytes(128), **CONFIGS[case])
    with little_memory():
        said = message_of(lambda: read_adapter(folder))
    assert said is None or str(folder) in said
    assert len(said or "") < 2000


def document(
    adapters: str = "{a: {path: ./a}}", recipes: str = "{r: {merge_method: linear, adapters: [{adapter: a}]}}"
) -> str:
    return f"version: 1\nadapters: {adapters}\nrecipes: {recipes}\n"


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BOMBS: dict[str, str] = {
    "billion laughs": laughs(10),
    "an anchor of itself": "version: 1\nadapters: &a {x: *a}",
    "merge keys": "x: &x {a: 1}\n" + "\n".join(f"y{i}: {{<<: *x}}" for i in range(100)),
    "a tag that runs code": "version: !!python/object/apply:os.system ['echo hacked > /tmp/hacked']",
    "a new tag": "version: !evil 1",
    "deep": "a: " + "[" * 3000,
    "deep by indentation": "\n".join(" " * i + f"k{i}:" for i in range(600)),
    "larger than may be": "# " + "x" * 300_000,
    "a number of 100,000 digits": "version: " + "9" * 100_000,
    "a key of 100,000 characters": "k" * 100_000 + ": 1",
    "10,000 keys": "\n".join(f"k{i}: 1" for i in range(10_000)),
    "characters that are none": 'version: "\\U7fffffff"',
    "an include": "adapters: !include /etc/passwd",
    "an environment variable as a tag": "base_model: !ENV ${HOME}",
}


@pytest.mark.parametrize("case", BOMBS)
def test_documents_that_blow_up(case, tmp_path):
    path = tmp_path / "recipes.yaml"
    path.write_text(BOMBS[case])
    with little_memory(), pytest.raises(UserInputError) as refused:
        load_recipes(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 50_000
    assert not Path("/tmp/hacked").exists()


def adapters(count: int) -> str:
    return "{" + ", ".join(f"a{i}: {{path: ./a{i}}}" for i in range(count)) + "}"


def recipe(names: Iterator[str] | list[str], **more: str) -> str:
    extra = "".join(f", {key}: {value}" for key, value in more.items())
    return f"{{r: {{merge_method: linear, adapters: [{', '.join(f'{{adapter: {name}}}' for name in names)}]{extra}}}}}"


GIANTS: dict[str, tuple[Callable[[], str], str]] = {
    "10,000 adapters": (lambda: document(adapters(10_000), recipe([f"a{i}" for i in range(10_000)])), "split it"),
    "one adapter 10,000 times": (lambda: document(recipes=recipe(["a"] * 10_000)), ""),
    "10,000 names that are none": (lambda: document(recipes=recipe([f"b{i}" for i in range(10_000)])), "'b0'"),
    "2,000 recipes in a chain": (
        lambda: document(
            recipes="{r0: {merge_method: linear, adapters: [{adapter: a}]}, "
            + ", ".join(f"r{i}: {{merge_method: linear, adapters: [{{adapter: r{i - 1}}}]}}" for i in range(1, 2000))
            + "}"
        ),
        "",
    ),
    "3,000 aliases": (
        lambda: document() + "aliases: {" + ", ".join(f"x{i}: r" for i in range(3000)) + "}\n",
        "",
    ),
}


@pytest.mark.parametrize("case", GIANTS)
def test_giants_are_read_or_refused_with_a_reason(case, tmp_path):
    make, wanted = GIANTS[case]
    path = tmp_path / "recipes.yaml"
    path.write_text(make())
    with little_memory():
        if wanted:
            with pytest.raises(UserInputError, match=wanted) as refused:
                load_recipes(path)
            assert len(str(refused.value)) < 50_000
            return
        recipes = load_recipes(path)
        name, plans = next(reversed(recipes.recipes)), []
        said = message_of(lambda: plans.append(planned(recipes, name)))
    assert len(said or "") < 50_000
    assert said or len(plans[0].to_json()) < 32 << 20, "it fits the control line"


def planned(recipes: RecipeFile, name: str) -> Plan:
    return make_plan(
        recipes,
        name,
        registry=default_registry(),
        adapter_hashes={"a": "0" * 64},
        base_model_hash="1" * 64,
        max_rank=64,
        dtype="float32",
    )
