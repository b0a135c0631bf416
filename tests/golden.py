# SPDX-License-Identifier: Apache-2.0
"""The golden cases: numbers that the official code of each method gave for small adapters, and how we ask for the same.

`recipe_for` goes by the fields of an entry alone (the method's family and its params), never by file, so that cases
with other parameters, weights and adapters go through it as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests import golden_do, golden_mergekit, golden_peft, golden_sota, golden_tuning
from vllm_merge import Adapter, LoraFactors

FOLDER = Path(__file__).parent / "golden"
Entry = Mapping[str, Any]


def entries() -> list[Entry]:
    """All entries of the index."""
    files: list[Entry] = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))["files"]
    return files


def load_case(entry: Entry, folder: Path = FOLDER) -> tuple[list[Adapter], dict[str, Tensor]]:
    """The adapters of a case, alpha / r as their scaling, and the expected ΔW by module."""
    tensors = load_file(folder / entry["file"])
    adapters = []
    for index, (rank, alpha) in enumerate(zip(entry["ranks"], entry["alphas"], strict=True)):
        factors = {}
        for module in entry["modules"]:
            key = f"in.{index}.{module}"
            if f"{key}.lora_A" in tensors:
                factors[module] = LoraFactors(tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"], alpha / rank)
        adapters.append(Adapter(f"adapter{index}", factors))
    return adapters, {key.removeprefix("out."): value for key, value in tensors.items() if key.startswith("out.")}


def recipe_for(entry: Entry) -> dict[str, Any] | None:
    """Keyword arguments of `merge` for an entry, or None for a method that is not there yet."""
    rule = next((rule for prefix, rule in _RULES.items() if entry["method"].startswith(prefix)), None)
    rules = _OTHERS if rule is None else (rule,)
    recipe = next((recipe for rule in rules if (recipe := rule(entry)) is not None), None)
    return None if recipe is None else {"weights": entry["weights"], "rank": "lossless", **recipe}


def _task_arithmetic(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    mean = params.get("reduce") == "mean" or params.get("normalize") is True
    return {
        "merge_method": "linear" if mean else "task_arithmetic",
        "parameters": {"lambda": params.get("lambda", 1.0)},
    }


def _reduction(params: Mapping[str, Any]) -> bool:
    """Whether the disjoint merge is a mean."""
    kind = params.get("merging_type", params.get("merge_func", "mean"))
    if kind not in ("mean", "dis-mean", "sum", "dis-sum"):
        raise ValueError(f"unknown reduction {kind!r}")
    return kind.endswith("mean")


def _ties(space: str, trim: str) -> Callable[[Entry], dict[str, Any]]:
    def recipe(entry: Entry) -> dict[str, Any]:
        params = entry["params"]
        return {
            "merge_method": "ties",
            "space": space,
            "parameters": {
                "density": params.get("K", params.get("topK")) / 100,
                "normalize": _reduction(params),
                "lambda": params["lambda"],
                "trim": trim,
            },
        }

    return recipe


def _knots_linear(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    if params["K"] != 100:
        raise ValueError("linear KnOTS does not trim")
    method = "linear" if _reduction(params) else "task_arithmetic"
    return {"merge_method": method, "space": "knots", "parameters": {"lambda": params["lambda"]}}


def _core_linear(entry: Entry) -> dict[str, Any]:
    """The sum, or Iso-C of it; in the core, and on the support of the dense change."""
    method = "iso_c" if entry["params"]["isotropize"] else "task_arithmetic"
    return {"merge_method": method, "space": "core", "parameters": {"lambda": entry["params"]["lambda"]}}


def _core_tsv(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    return {
        "merge_method": "tsv_m",
        "parameters": {"lambda": params["lambda"], "isotropize": params["isotropize"]},
    }


def _tsv_m(entry: Entry) -> dict[str, Any]:
    return {"merge_method": "tsv_m", "parameters": {"lambda": entry["params"]["alpha"]}}


def _iso_c(entry: Entry) -> dict[str, Any]:
    return {"merge_method": "iso_c", "parameters": {"lambda": entry["params"]["alpha"]}}


def _iso_cts(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    fraction = params.get("common_space_fraction", params.get("k_frac"))
    return {"merge_method": "iso_cts", "parameters": {"lambda": params["alpha"], "common_fraction": fraction}}


def _opcm(entry: Entry) -> dict[str, Any]:
    return {"merge_method": "opcm", "parameters": {"alpha": entry["params"]["alpha"]}}


def _ctm(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    parameters = {"target_rank": params["lora_rank"], "beta": params["beta"], "lambda": params["lambda"]}
    if params["merge_method"] == "tv":
        return {"merge_method": "ctm", "parameters": {**parameters, "rule": "sum"}}
    return {
        "merge_method": "ctm",
        "parameters": {**parameters, "rule": params["merge_method"], "density": params["topK"] / 100},
    }


def _core_ties(entry: Entry) -> dict[str, Any] | None:
    return None if entry["params"]["isotropize"] else _ties("core", "module")(entry)


def _truncated_sum(entry: Entry) -> dict[str, Any]:
    params = entry["params"]
    return {
        "merge_method": "task_arithmetic",
        "parameters": {"lambda": params["lambda"]},
        "rank": params["lora_rank"],
    }


_OTHERS = (
    golden_do.recipe_for,
    golden_mergekit.recipe_for,
    golden_peft.recipe_for,
    golden_sota.recipe_for,
    golden_tuning.recipe_for,
)

_RULES: dict[str, Callable[[Entry], dict[str, Any] | None]] = {
    "ta_": _task_arithmetic,
    "ties_k": _ties("delta", "global"),
    "knots_ties_": _ties("knots", "global"),
    "knots_mean": _knots_linear,
    "core_ta": _core_linear,
    "core_ties_": _core_ties,
    "core_tsv": _core_tsv,
    "core_iso_c": _core_linear,
    "iso_c_support": _core_linear,
    "iso_c_dense": _iso_c,
    "iso_cts_": _iso_cts,
    "tsvm_": _tsv_m,
    "opcm": _opcm,
    "ctm_truncated_ta": _truncated_sum,
    "ctm_t": _ctm,
    "mergekit_task_arithmetic": _task_arithmetic,
    "peft_cat": lambda entry: {"merge_method": "task_arithmetic"},
}
