# SPDX-License-Identifier: Apache-2.0
"""What the comparisons on GPUs rest on: an adapter in another basis, and what is judged to be too far off."""

import torch
from safetensors.torch import load_file

from tests.conftest import DEMO
from tests.serving.nearness import Answers, differences, in_another_basis, judge

IDS = [[1, 2, 3, 4, 5]]
SOURCE = DEMO / "adapters" / "sort"


def test_another_basis_has_other_numbers_and_the_same_weight_changes(tmp_path):
    in_another_basis(SOURCE, tmp_path / "turned")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (SOURCE, tmp_path / "turned"))
    assert set(before) == set(after)
    for key in (key for key in before if ".lora_A." in key):
        other = key.replace(".lora_A.", ".lora_B.")
        a, b = after[key].float(), after[other].float()
        expected = before[other].float() @ before[key].float()
        assert (b @ a - expected).norm() < 0.01 * expected.norm()
        assert (a - before[key].float()).norm() > 0.1 * a.norm()
    assert (tmp_path / "turned" / "adapter_config.json").read_text() == (SOURCE / "adapter_config.json").read_text()


def answers(*values: float) -> Answers:
    return IDS, [torch.tensor(values)]


def test_differences_end_at_the_first_token_that_differs():
    other = [[1, 2, 3, 9, 5]], [torch.tensor([-1.0, -1.5, -9.0, -9.0])]
    assert differences(answers(-1.0, -1.0, -1.0, -1.0), other).tolist() == [0.0, 0.5]


def found(same: float = 0.0, exported: float = 0.0, again: float = 0.0) -> list[str]:
    """Judged answers whose first value is off by these; two roundings differ by 0.08, a mean of 0.02."""
    recorded: dict[str, object] = {}
    wrong = judge(
        {"m": answers(-1.0, -1.0, -1.0, -1.0)},
        {"m": answers(-1.0 + again, -1.0, -1.0, -1.0)},
        {"m": answers(-1.0 + same, -1.0, -1.0, -1.0)},
        {"m": answers(-1.0 + exported, -1.0, -1.0, -1.0)},
        {"m": answers(-1.0 + exported + 0.08, -1.0, -1.0, -1.0)},
        recorded.__setitem__,
    )
    assert len(recorded) == 1
    return wrong


def test_what_is_judged():
    assert not found()
    assert not found(same=0.015, exported=0.2)
    assert not found(same=0.03, again=0.02), "as near as asking again is"
    (wrong,) = found(same=0.03)
    assert wrong.startswith("m: not what vLLM makes of the same bytes: largest 0.0300")
    (wrong,) = found(exported=0.3)
    assert "mean 0.07500 from a merge on the CPU, two roundings differ by 0.02000" in wrong
    assert len(found(same=1.0, exported=1.0)) == 2, "all that is wrong is told"
