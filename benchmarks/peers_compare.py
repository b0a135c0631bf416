# SPDX-License-Identifier: Apache-2.0
"""How far our merges are from those of PEFT, mergekit, LoRAX and KnOTS of the same adapters.

    python benchmarks/peers_compare.py [--mergekit PATH/TO/mergekit-multi]

PEFT runs in this process, mergekit by its command, both on three of the demo's adapters; what they are asked is turned into
a recipe by `vllm-merge convert`, and that recipe's ΔW is compared with theirs, and beside it the ΔW of the method that one would
choose here. LoRAX and KnOTS have no package that merges by itself: their results are the recorded ones of tests/golden, on the
adapters that are recorded with them; so are mergekit's where it is not installed. Writes benchmarks/results/peers_compare.json and
the table of docs/methods/choosing.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from peers_cases import GOLDEN, MERGEKIT, PEFT, Case, mergekit_config, peft_call
from peers_run import Deltas, Mergekit, Peft
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import golden  # noqa: E402  (recorded results, and what they are here, which the tests use too)
from vllm_merge import Adapter, MergedAdapter, merge  # noqa: E402
from vllm_merge.convert import convert  # noqa: E402
from vllm_merge.methods.registry import default_registry  # noqa: E402
from vllm_merge.recipe_files import check_precondition  # noqa: E402

DEMO = ROOT / "examples" / "demo"
RESULTS = ROOT / "benchmarks" / "results" / "peers_compare.json"
PAGE = ROOT / "docs" / "methods" / "choosing.md"
BEGIN, END = "<!-- generated: python benchmarks/peers_compare.py -->", "<!-- end of generated -->"
WEIGHTS = {"add": 1.0, "reverse": 0.8, "vowels": 0.6}
FOLDERS = {name: DEMO / "adapters" / name for name in WEIGHTS}
SAME = 1e-4  # relative difference up to which results are called the same: rounding of float32


def difference(own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """‖own − theirs‖_F / ‖theirs‖_F over all modules; one that is missing counts as 0."""
    apart = size = 0.0
    for module in own.keys() | theirs.keys():
        target = theirs.get(module, torch.zeros(())).double()
        apart += float((own.get(module, torch.zeros(())).double() - target).square().sum())
        size += float(target.square().sum())
    return (apart / size) ** 0.5


def deltas(merged: MergedAdapter) -> Deltas:
    return {module: merged.delta(module) for module in merged.factors}


def converted(source: str, asked: Mapping[str, Any], rank: int | str | None) -> dict[str, Any]:
    """The recipe that `vllm-merge convert` makes of it, as arguments of `merge`. rank: in place of the recipe's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asked.yaml"
        file.write_text(yaml.safe_dump(dict(asked)), encoding="utf-8")
        found = convert(
            file,
            default_registry(),
            check_precondition,
            source=source,
            adapters={name: str(folder) for name, folder in FOLDERS.items()},
        )
    recipe = found.document["recipes"]["merged"]
    return {
        "names": [item["adapter"] for item in recipe["adapters"]],
        "merge_method": recipe["merge_method"],
        "space": recipe.get("space"),
        "parameters": recipe.get("parameters", {}),
        "adapter_parameters": [item.get("parameters", {}) for item in recipe["adapters"]],
        "rank": rank or recipe.get("rank", "lossless"),
    }


def row(
    case: Case, source: str, theirs: Deltas, ours: Mapping[str, Any], adapters: Mapping[str, Adapter]
) -> dict[str, Any]:
    """What a case comes to. ours: the converted recipe; the default one has its adapters, weights and rank."""
    chosen = [adapters[name] for name in ours["names"]]
    arguments = {key: value for key, value in ours.items() if key != "names"}
    weights = [parameters.get("weight", 1.0) for parameters in arguments["adapter_parameters"]]
    fresh = {"merge_method": case.here, "weights": weights, "parameters": dict(case.parameters), "rank": ours["rank"]}
    return {
        "peer": case.peer,
        "method": case.name,
        "source": source,
        "adapters": ours["names"],
        "converted": {key: value for key, value in arguments.items() if value not in (None, {}, [])},
        "converted_difference": difference(deltas(merge(chosen, **arguments, report="brief")), theirs),
        "default": fresh,
        "default_difference": difference(deltas(merge(chosen, **fresh, report="brief")), theirs),
        "why": case.why,
    }


def peft_rows(folders: Mapping[str, Path]) -> Iterator[dict[str, Any]]:
    peer = Peft(DEMO / "model", folders)
    adapters = {name: Adapter.from_peft(folder) for name, folder in folders.items()}
    for case in PEFT:
        call = peft_call(case, WEIGHTS)
        theirs = peer.merged(call, seed=0)
        found = row(case, f"peft {version('peft')}", theirs, converted("peft", call, None), adapters)
        yield {**found, **again(case, theirs, lambda call=call: peer.merged(call, seed=1))}


def with_unequal_entries(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """PEFT's rows, and in those that may depend on how equal entries are told apart, the difference where none are equal.

    For that every entry of the adapters, which are in bfloat16, is moved by about 0.1 %.
    """
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as text:
        for name, folder in FOLDERS.items():
            shutil.copytree(folder, Path(text) / name)
            file = Path(text) / name / "adapter_model.safetensors"
            moved = {
                key: value.float() * (1 + 1e-3 * torch.randn(value.shape, generator=generator))
                for key, value in sorted(load_file(file).items())
            }
            save_file(moved, file)
        unequal = {found["method"]: found for found in peft_rows({name: Path(text) / name for name in FOLDERS})}
    return [
        {**found, "of_unequal_entries": unequal[found["method"]]["converted_difference"]}
        if found["converted_difference"] > SAME and "peer_at_another_seed" not in found
        else found
        for found in rows
    ]


def mergekit_rows(peer: Mergekit) -> Iterator[dict[str, Any]]:
    adapters = {name: Adapter.from_peft(folder) for name, folder in FOLDERS.items()}
    folders = {name: str(folder) for name, folder in FOLDERS.items()}
    configs = {case.name: mergekit_config(case, str(DEMO / "model"), folders, WEIGHTS) for case in MERGEKIT}
    first = peer.merged(configs, seed=0)
    second = peer.merged({case.name: configs[case.name] for case in MERGEKIT if case.random}, seed=1)
    for case in MERGEKIT:
        ours = converted("mergekit", configs[case.name], "lossless")
        found = row(case, f"mergekit {peer.version}", first[case.name], ours, adapters)
        yield {**found, **again(case, first[case.name], lambda case=case: second[case.name])}
    (sum_,) = (case for case in MERGEKIT if case.name == "task_arithmetic")
    ours = converted("mergekit", configs[sum_.name], "lossless")
    theirs = peer.merged({sum_.name: configs[sum_.name]}, seed=0, lora_dtype=None)[sum_.name]
    case = replace(
        sum_, why="without `--lora-merge-dtype float32` it puts adapters into the base in the base's bfloat16"
    )
    yield {**row(case, f"mergekit {peer.version}", theirs, ours, adapters), "rounded": True}


def again(case: Case, theirs: Deltas, anew: Any) -> dict[str, float]:
    """How far the peer is from itself at another seed, where it draws."""
    return {"peer_at_another_seed": difference(anew(), theirs)} if case.random else {}


def golden_rows(cases: tuple[Case, ...]) -> Iterator[dict[str, Any]]:
    """Of recorded results: one row of a case's first entry."""
    entries = {entry["file"]: entry for entry in golden.entries()}
    for case in cases:
        entry = entries[f"{case.recorded}.safetensors"]
        recorded, theirs = golden.load_case(entry)
        recipe = golden.recipe_for(entry)
        if recipe is None:
            raise SystemExit(f"{case.recorded}: has no recipe in tests/golden.py")
        ours = {
            **{key: value for key, value in recipe.items() if key != "weights"},
            "names": [adapter.name for adapter in recorded],
            "adapter_parameters": [
                {**own, **({} if weight is None else {"weight": weight})}
                for own, weight in zip(
                    recipe.get("adapter_parameters", [{}] * len(recorded)),
                    recipe["weights"] or [None] * len(recorded),
                    strict=True,
                )
            ],
        }
        commit = f"{entry['source']['repository']} @{entry['source']['commit'][:7]}, recorded"
        yield row(case, commit, theirs, ours, {adapter.name: adapter for adapter in recorded})


def shown(value: float) -> str:
    percent = 100 * value
    return "the same" if value <= SAME else f"{percent:.0f} %" if percent >= 10 else f"{percent:.2g} %"


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| theirs | by `convert` | apart | chosen afresh here | apart | why |",
        "|---|---|---|---|---|---|",
    ]
    for found in rows:
        theirs = f"{found['peer']} `{found['method']}`"
        theirs += (
            " (recorded)" if found["source"].endswith("recorded") else ", as it comes" if "rounded" in found else ""
        )
        apart = shown(found["converted_difference"])
        if "peer_at_another_seed" in found:
            apart += f"; theirs at another seed {shown(found['peer_at_another_seed'])}"
        if "of_unequal_entries" in found:
            apart += f"; without equal entries {shown(found['of_unequal_entries'])}"
        default = shown(found["default_difference"])
        converted_to, fresh = (
            f"[{name}]({name}.md)" for name in (found["converted"]["merge_method"], found["default"]["merge_method"])
        )
        lines.append(f"| {theirs} | {converted_to} | {apart} | {fresh} | {default} | {found['why']} |")
    return "\n".join(lines)


def renewed(page: str, block: str) -> str:
    """The page with another block between its markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare our merges with those of other programs.")
    parser.add_argument("--mergekit", default="mergekit-multi", help="mergekit's command for several merges")
    args = parser.parse_args()
    mergekit = Mergekit.found(args.mergekit, DEMO / "model")
    rows = with_unequal_entries(list(peft_rows(FOLDERS)))
    if mergekit is None:
        print(f"mergekit: no command {args.mergekit}; its recorded results are taken")
        rows += golden_rows(tuple(case for case in MERGEKIT if case.recorded))
    else:
        rows += mergekit_rows(mergekit)
    rows += golden_rows(GOLDEN)
    versions = {name: version(name) for name in ("vllm-merge", "torch", "peft", "transformers")}
    versions |= {} if mergekit is None else {"mergekit": mergekit.version}
    RESULTS.write_text(
        json.dumps({"versions": versions, "weights": WEIGHTS, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), table(rows)), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
