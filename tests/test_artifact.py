# SPDX-License-Identifier: Apache-2.0
"""Results on disk and as adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.adapters_in_memory import distance, map_factors, random_adapter, three, weighted_sum
from vllm_merge import Adapter, LoraFactors, MergedAdapter, UserInputError, merge

FILES = {"adapter_config.json", "adapter_model.safetensors", "merge_report.json", "recipe.json"}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def mixed() -> MergedAdapter:
    """A result whose modules differ in rank."""
    x, y, z = three()
    y = Adapter("y", {m: f for m, f in y.factors.items() if "layers.0" in m})
    return merge([x, y, z], merge_method="ties", parameters={"density": 0.5}, name="support")


def test_save_load_save_gives_the_same_bytes(tmp_path: Path) -> None:
    merged = mixed()
    assert len(set(merged.report.ranks.values())) > 1
    merged.save_pretrained(tmp_path / "one")
    loaded = MergedAdapter.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    assert set(bytes_of(tmp_path / "one")) == FILES
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert loaded.tensors_sha256 == merged.tensors_sha256
    assert (loaded.name, loaded.report, loaded.provenance) == ("support", merged.report, merged.provenance)


def test_a_saved_result_reads_as_an_adapter(tmp_path: Path) -> None:
    merged = mixed()
    merged.save_pretrained(tmp_path / "out")
    adapter = Adapter.from_peft(tmp_path / "out", "again")
    assert {factors.scaling for factors in adapter.factors.values()} == {1.0}
    assert distance(adapter, merged) < 1e-7


def test_nothing_is_overwritten_or_left_half(tmp_path: Path) -> None:
    merged = mixed()
    merged.save_pretrained(tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(UserInputError, match="exists and is not an empty folder"):
        merged.save_pretrained(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before
    x = random_adapter("x", 2, 1)
    empty = merge([x, x], merge_method="task_arithmetic", weights=[1.0, -1.0])
    with pytest.raises(UserInputError, match="no module with a weight change"):
        empty.save_pretrained(tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_refused(tmp_path: Path) -> None:
    mixed().save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "merge_report.json").unlink()
    with pytest.raises(UserInputError, match=r"has no merge_report\.json"):
        MergedAdapter.from_pretrained(tmp_path / "out")


def test_a_result_can_be_merged_again() -> None:
    x, y, z = three()
    first = merge([x, y], merge_method="linear").as_adapter()
    again = merge([first, z], merge_method="linear")
    assert distance(again, weighted_sum([x, y, z], [0.25, 0.25, 0.5])) < 1e-6


def test_hashes() -> None:
    x = random_adapter("x", 2, 1)
    assert x.content_hash == Adapter("other name", dict(reversed(x.factors.items()))).content_hash
    assert x.content_hash != map_factors(x, lambda f: LoraFactors(f.A, f.B, 2.0)).content_hash
    assert x.content_hash != map_factors(x, lambda f: LoraFactors(f.A.double(), f.B)).content_hash
    assert Adapter("x", x.factors, content_hash="ab").content_hash == "ab"


def test_modules_are_in_natural_order() -> None:
    one = LoraFactors(torch.ones(1, 2), torch.ones(2, 1))
    assert list(Adapter("x", {f"layers.{i}.q": one for i in (10, 9, 2)}).factors) == [
        f"layers.{i}.q" for i in (2, 9, 10)
    ]


@pytest.mark.parametrize(
    ("a", "b", "scaling", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 1), 1.0, r"same rank r; found A \(2, 3\) torch.float32, B \(3, 1\)"),
        (torch.ones(3), torch.ones(3, 1), 1.0, "must be matrices"),
        (torch.ones(0, 3), torch.ones(3, 0), 1.0, "must not be empty"),
        (torch.ones(1, 3, dtype=torch.int8), torch.ones(3, 1), 1.0, "floating point; found A .* torch.int8"),
        (torch.ones(1, 3), torch.ones(3, 1), float("inf"), "scaling must be finite; found inf"),
    ],
)
def test_factors_that_do_not_fit(a: torch.Tensor, b: torch.Tensor, scaling: float, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        LoraFactors(a, b, scaling)
