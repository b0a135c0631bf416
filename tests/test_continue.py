# SPDX-License-Identifier: Apache-2.0
"""OPCM goes on from an earlier result, of a folder or of a recipe, as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.adapters_in_memory import distance, random_adapter, three
from vllm_merge import Adapter, MergedAdapter, UserInputError, load_recipes, merge
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.adapters.peft import hash_adapter, read_adapter, write_adapter
from vllm_merge.cli.app import app
from vllm_merge.plan_runner import run_plan

WHOLE = "{merge_method: opcm, adapters: [{adapter: x}, {adapter: y}, {adapter: z}], rank: lossless}"
FIRST = "{merge_method: opcm, adapters: [{adapter: x}, {adapter: y}], rank: lossless, parameters: {lambda: 0.4}}"
MORE = "{merge_method: opcm, continue: EARLIER, adapters: [{adapter: z}], rank: lossless}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three adapters, and a recipe file whose recipe `more` goes on from `first` or from the folder it was saved to."""
    for adapter in three():
        write_adapter(tmp_path / adapter.name, adapter.factors, base_model=None)
    return tmp_path


def recipe_file(folder: Path, earlier: str) -> Path:
    file = folder / "r.yaml"
    saved = ", saved: {path: ./saved}" if (folder / "saved").exists() else ""
    file.write_text(
        f"version: 1\nadapters: {{x: {{path: ./x}}, y: {{path: ./y}}, z: {{path: ./z}}{saved}}}\n"
        f"recipes:\n  whole: {WHOLE}\n  first: {FIRST}\n  more: {MORE.replace('EARLIER', earlier)}\n"
    )
    return file


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def whole(folder: Path) -> MergedAdapter:
    return merge([read_adapter(folder / name) for name in "xyz"], merge_method="opcm", rank="lossless")


def test_a_recipe_of_the_file_is_continued(folder: Path) -> None:
    file = recipe_file(folder, "first")
    done = run("merge", file, "more", "-o", folder / "out")
    assert done.exit_code == 0, done.output
    result = MergedAdapter.from_pretrained(folder / "out")
    assert distance(result, whole(folder)) < 1e-6
    assert result.report.continuation["order"] == ["x", "y", "z"]


def test_a_saved_folder_is_continued_without_the_earlier_adapters(folder: Path) -> None:
    expected = whole(folder)
    assert run("merge", recipe_file(folder, "first"), "first", "-o", folder / "saved").exit_code == 0
    for name in "xy":
        shutil.rmtree(folder / name)
    file = recipe_file(folder, "saved")
    done = run("merge", file, "more", "-o", folder / "out")
    assert done.exit_code == 0, done.output
    result = MergedAdapter.from_pretrained(folder / "out")
    assert distance(result, expected) < 1e-6
    assert result.report.continuation["order"] == ["x", "y", "z"]
    # And from Python, with one more.
    w = random_adapter("w", 4, 8)
    again = merge([result.as_adapter(), w], merge_method="opcm", parameters={"resume": True}, rank="lossless")
    assert distance(again, merge([*three(), w], merge_method="opcm", rank="lossless")) < 1e-6
    read = Adapter.from_peft(folder / "out")
    assert distance(merge([read, w], merge_method="opcm", parameters={"resume": True}, rank="lossless"), again) < 1e-6


def test_the_plan_of_a_continued_folder(folder: Path) -> None:
    assert run("merge", recipe_file(folder, "first"), "first", "-o", folder / "saved").exit_code == 0
    planned = run("plan", recipe_file(folder, "saved"), "more")
    assert planned.exit_code == 0, planned.output
    assert "saved, z" in planned.output


def test_a_folder_without_the_state_is_refused(folder: Path) -> None:
    assert run("merge", recipe_file(folder, "first"), "first", "-o", folder / "saved").exit_code == 0
    (folder / "saved" / "merge_report.json").unlink()
    failed = run("plan", recipe_file(folder, "saved"), "more")
    assert isinstance(failed.exception, UserInputError)
    assert "r.yaml:6: recipes.more.continue: adapter 'saved' carries no state" in str(failed.exception)


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    report = folder / "saved" / "merge_report.json"
    content = json.loads(report.read_text())
    change(content)
    report.write_text(json.dumps(content))


def test_the_identity_covers_the_state_and_nothing_else_of_the_report(folder: Path) -> None:
    assert run("merge", recipe_file(folder, "first"), "first", "-o", folder / "saved").exit_code == 0
    before = hash_adapter(folder / "saved")
    assert read_adapter(folder / "saved").content_hash == before
    catalogue = Catalogue()
    catalogue.register("saved", folder / "saved")
    assert (catalogue.content_hash("saved"), catalogue.get("saved").continues) == (before, "opcm")
    edited(folder, lambda report: report.update(seconds={}))
    assert hash_adapter(folder / "saved") == before
    edited(folder, lambda report: report["continuation"].update({"lambda": 3.0}))
    assert hash_adapter(folder / "saved") == catalogue.content_hash("saved") != before


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda r: r["continuation"].pop("norms"), "continuation.norms: Field required"),
    "text": (
        lambda r: r["continuation"].update({"lambda": "1"}),
        "continuation.lambda: Input should be a valid number",
    ),
    "nan": (lambda r: r["continuation"].update({"lambda": float("nan")}), "continuation.lambda: Input should be a fin"),
    "negative": (
        lambda r: r["continuation"].update(norms=[-1.0, 2.0]),
        "continuation.norms.0: Input should be greater",
    ),
    "lengths": (lambda r: r["continuation"].update(norms=[1.0]), "continuation: 2 names for 1 norms"),
    "unknown": (lambda r: r["continuation"].update(more=1), "continuation.more: Extra inputs are not permitted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_state_is_refused(folder: Path, case: str) -> None:
    assert run("merge", recipe_file(folder, "first"), "first", "-o", folder / "saved").exit_code == 0
    change, message = WRONG[case]
    edited(folder, change)
    for read in (read_adapter, hash_adapter):
        with pytest.raises(UserInputError, match=f"adapter 'saved': .*merge_report.json: {message}"):
            read(folder / "saved")
    (folder / "saved" / "merge_report.json").write_text("[" * 100_000)
    with pytest.raises(UserInputError, match=r"merge_report.json: is not JSON .* restore it, or remove it"):
        read_adapter(folder / "saved")


def test_a_chain_of_recipes(folder: Path) -> None:
    file = recipe_file(folder, "first")
    text = file.read_text().replace(
        "  first:", "  one: {merge_method: opcm, adapters: [{adapter: x}], rank: lossless}\n  first:"
    )
    two = "{merge_method: opcm, continue: one, adapters: [{adapter: y}], rank: lossless}"
    file.write_text(text.replace(FIRST, two))
    assert load_recipes(file).stage_order("more") == ["one", "first", "more"]
    assert run("merge", file, "more", "-o", folder / "out").exit_code == 0
    assert distance(MergedAdapter.from_pretrained(folder / "out"), whole(folder)) < 1e-6


def test_stages_hand_on_their_state(folder: Path) -> None:
    """Through run_plan alone, as a server does it."""
    from vllm_merge.methods.registry import default_registry
    from vllm_merge.recipe.plan import Plan, make_plan

    file = load_recipes(recipe_file(folder, "first"))
    hashes = {name: hash_adapter(folder / name) for name in "xyz"}
    options: dict[str, Any] = {"base_model_hash": "", "max_rank": 64, "dtype": "float32"}
    plan = make_plan(file, "more", registry=default_registry(), adapter_hashes=hashes, **options)
    assert distance(run_plan(Plan.from_json(plan.to_json()), report="brief"), whole(folder)) < 1e-6
