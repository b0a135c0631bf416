# SPDX-License-Identifier: Apache-2.0
"""Recipe files against the methods that are installed: what their parameters refuse, and in which words."""

from pathlib import Path

import pytest

from vllm_merge import load_recipes
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.loading import parse_recipes
from vllm_merge.recipe.problems import RecipeError


def load(parameters: str, method: str = "ties") -> RecipeFile:
    text = (
        "version: 1\nadapters: {a: {path: ./a}}\nrecipes:\n"
        f"  r: {{merge_method: {method}, adapters: [{{adapter: a}}], parameters: {{{parameters}}}}}\n"
    )
    return parse_recipes(text, Path("/files/r.yaml"), default_registry())


WRONG = {
    "density: 0": "density: merge method 'ties': parameter 'density' is 0; allowed is number > 0, ≤ 1 (default 0.2)",
    "density: [0.5, 2]": "density: merge method 'ties': parameter 'density' is 2; allowed is number > 0, ≤ 1 "
    "(default 0.2)",
    "weight: '0.5'": "weight: is '0.5'; write 0.5",
    "weight: true": "weight: merge method 'ties': parameter 'weight' is True; allowed is number (default 1.0)",
    "normalize: yes": "normalize: is 'yes'; write true",
    "normalize: 0": "normalize: is 0; write false",
    "trim: globally": "trim: merge method 'ties': parameter 'trim' is 'globally'; allowed is one of 'global', 'module' "
    "(default 'global')",
    "trim: [global]": "trim: is a list with 'global' in it; a gradient over depth is a list of numbers",
    "lambda: .nan": "lambda: is nan; numbers must be finite",
    "densty: 1": "densty: merge method 'ties' has no parameter 'densty', did you mean 'density'? (its parameters: "
    "weight, density, normalize, trim, lambda)",
}


@pytest.mark.parametrize("parameters", WRONG)
def test_message(parameters: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(parameters)
    assert str(caught.value) == f"/files/r.yaml:4: recipes.r.parameters.{WRONG[parameters]}"


@pytest.mark.parametrize(
    "parameters",
    ["density: 1, weight: [0, -1.5], normalize: false, trim: module, lambda: [{value: 2}]", "weight: 1e-3"],
)
def test_right_ones_are_accepted(parameters: str) -> None:
    assert load(parameters).recipes["r"].merge_method == "ties"


WRONG_PRECONDITIONS = {
    "norm_cup": "unknown precondition 'norm_cup', did you mean 'norm_cap'?",
    "{norm_cap: {mad: 1}}": "precondition 'norm_cap' has no parameter 'mad', did you mean 'mads'? (its parameters: mads)",
    "{norm_cap: {mads: -1}}": "precondition 'norm_cap': parameter 'mads' is -1; allowed is number ≥ 0 (default 3.0)",
}


@pytest.mark.parametrize("item", WRONG_PRECONDITIONS)
def test_preconditions(item: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    text = "version: 1\nadapters: {a: {path: ./a}}\nrecipes:\n  r: {merge_method: ties, adapters: [{adapter: a}], "
    file.write_text(f"{text}precondition: [norm_cap, {item}]}}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipes(file)
    assert str(caught.value).startswith(f"{file}:4: recipes.r.precondition[1]: {WRONG_PRECONDITIONS[item]}")
    file.write_text(f"{text}precondition: [norm_cap, {{norm_cap: {{mads: 2}}}}]}}\n")
    assert load_recipes(file).recipes["r"].precondition == [{"norm_cap": {}}, {"norm_cap": {"mads": 2}}]
