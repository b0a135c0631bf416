# SPDX-License-Identifier: Apache-2.0
"""The recipe file that a run leaves behind: plain, without data, served by any server; and its corrected adapters."""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vllm_merge.adapters.peft import write_adapter
from vllm_merge.errors import UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.schema import AdapterEntry
from vllm_merge.recipe.yaml_tree import MAX_BYTES
from vllm_merge.recipe_files import check_precondition
from vllm_merge.tuning.blocks import LONGEST_NAME
from vllm_merge.tuning.blocks import recipes as block_recipes
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.methods import TuneMethod
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.weights import DECIMALS, Groups, Per, written

RECIPE_FILE = "recipe.yaml"
ADAPTERS = "adapters"  # the folder of corrected ones
WIDTH = 118


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass(frozen=True)
class Writer:
    """Writes the learned recipe of a run into its folder. notes: sentences at the head of the file."""

    file: RecipeFile
    start: Start
    method: TuneMethod
    folder: Path
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """What the learned recipe is called: the recipe's name and the method's."""
        return self._named(self.start.plan.name)

    def _named(self, name: str) -> str:
        ending = "-" + self.method.name.replace("++", "-pp")
        return name[: LONGEST_NAME - len(ending)] + ending

    def check(self, per: Per | None) -> None:
        """Raise UserInputError where what would be written, with a weight for each group, is no recipe file."""
        learned = Learned()
        if per is not None:
            groups = Groups.of(self.start.modules, per)
            different = torch.arange(1, len(groups.names) * len(self.start.adapters) + 1, dtype=torch.float64)
            learned = Learned(weights=groups.spread(different.view(len(groups.names), -1) / 10**DECIMALS))
        text, path = self._text(learned, None), self.folder / RECIPE_FILE
        if (size := len(text.encode())) > MAX_BYTES:
            raise UserInputError(
                f"the recipe would have {size:,} bytes, and a recipe file has at most {MAX_BYTES:,}; choose a coarser --per, "
                "or fewer adapters"
            )
        parse_recipes(text, path, default_registry(), check_precondition=check_precondition)

    def write(self, learned: Learned, safety: dict[str, Any] | None) -> Path:
        """Write adapters, where there are corrected ones, and the recipe file, which appears by a rename."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if learned.adapters:
            self._write_adapters(learned, self.folder)
        path, beside = self.folder / RECIPE_FILE, self.folder / f".{RECIPE_FILE}"
        beside.write_text(self._text(learned, safety), encoding="utf-8")
        beside.replace(path)
        return path

    def _write_adapters(self, learned: Learned, folder: Path) -> None:
        """Into a folder beside, put in the place of an earlier one."""
        with tempfile.TemporaryDirectory(prefix=f".{ADAPTERS}.", dir=folder) as beside:
            for adapter in learned.adapters:
                write_adapter(Path(beside) / "new" / adapter.name, adapter.factors, base_model=adapter.base_model)
            if (folder / ADAPTERS).exists():
                (folder / ADAPTERS).rename(Path(beside) / "old")
            (Path(beside) / "new").rename(folder / ADAPTERS)
            shutil.rmtree(Path(beside) / "old", ignore_errors=True)

    def _text(self, learned: Learned, safety: dict[str, Any] | None) -> str:
        lines = [line for note in self.notes for line in textwrap.wrap(note, WIDTH - 2)]
        body = yaml.dump(
            self._document(learned, safety, self.folder.absolute()),
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=WIDTH,
            default_flow_style=None,
        )
        return "".join(f"# {line}\n" for line in lines) + body

    def _document(self, learned: Learned, safety: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
        name = self.start.plan.name
        recipe = self.file.recipes[name].model_dump(by_alias=True, exclude_unset=True)
        for key in ("safety", "on_miss", "fallback"):  # of this file's names, and measured of this recipe
            recipe.pop(key, None)
        recipes: dict[str, Any] = {}
        if learned.adapters:
            names = {adapter.name: self._named(adapter.name) for adapter in learned.adapters}
            adapters = {names[a.name]: {"path": f"./{ADAPTERS}/{a.name}"} for a in learned.adapters}
            recipe = self._as_sum(recipe, [{"adapter": own} for own in names.values()])
            recipe.pop("precondition", None)
            recipe["parameters"] = {"lambda": learned.scale}
        else:
            if learned.weights is not None:
                recipe = self._weighted(recipe, learned.weights)
            earlier = [stage for stage in self.file.stage_order(name) if stage != name]
            recipes = {s: self.file.recipes[s].model_dump(by_alias=True, exclude_unset=True) for s in earlier}
            if learned.blocks is not None:
                stages, recipe = block_recipes(learned.blocks, self.start.modules, self.name, recipe)
                recipes.update(stages)
            sources = {s for r in (*earlier, name) for s in self.file.recipes[r].sources}
            adapters = {a: self._entry(self.file.adapters[a], folder) for a in self.file.adapters if a in sources}
        if safety is not None:
            recipe["safety"] = safety
        document: dict[str, Any] = {"version": 1}
        if self.file.base_model is not None:
            document["base_model"] = _relative(self.file.base_model, folder)
        return {**document, "adapters": adapters, "recipes": {**recipes, self.name: recipe}}

    def _weighted(self, recipe: dict[str, Any], weights: Tensor) -> dict[str, Any]:
        """The recipe with weights (modules, n)."""
        inputs = []
        for item, adapter, column in zip(recipe["adapters"], self.start.adapters, weights.mT.tolist(), strict=True):
            mine = {m: w for m, w in zip(self.start.modules, column, strict=True) if m in adapter.factors}
            value = written(list(mine), list(mine.values()))
            inputs.append({"adapter": item["adapter"], "parameters": {**item.get("parameters", {}), "weight": value}})
        if not self.method.keeps:
            return self._as_sum(recipe, inputs)
        recipe.get("parameters", {}).pop("weight", None)
        return {**recipe, "adapters": inputs}

    @staticmethod
    def _as_sum(recipe: dict[str, Any], inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The recipe as a plain weighted sum of these inputs, λ within their weights."""
        kept = {
            key: value
            for key, value in recipe.items()
            if key not in ("merge_method", "space", "parameters", "adapters")
        }
        return {"merge_method": "task_arithmetic", "adapters": inputs, **kept}

    @staticmethod
    def _entry(entry: AdapterEntry, folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = entry.model_dump(exclude_unset=True)
        return {**found, "path": _relative(entry.path, folder)}


def _relative(path: str, folder: Path) -> str:
    """A folder as it is seen from the file that names it; the name of a repository as it is."""
    if not Path(path).is_absolute():
        return path
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith(".") else f"./{relative}"
