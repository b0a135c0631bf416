# SPDX-License-Identifier: Apache-2.0
"""The quantities that time and memory are fitted with."""

import pytest

from vllm_merge.algebra.symmetric import LARGEST_AT_ONCE
from vllm_merge.forecast.work import QUANTITIES, ModuleSize, case_key, quantities

MODULE = ModuleSize(d_out=10, d_in=6, ranks=(2, 1), rank=3)


@pytest.mark.parametrize("space", ["core", "knots", "factors"])
def test_the_quantities_of_a_module_by_hand(space: str) -> None:
    found = {"fixed": 1, "modules": 1, "stacked": 3 * 16, "grams": 9 * 16}
    assert quantities(space, [MODULE]) == dict.fromkeys(QUANTITIES, 0) | found


def test_delta_has_dense_entries_in_place_of_stacks() -> None:
    found = {"fixed": 1, "modules": 1, "entries": 2 * 60, "products": 3 * 60, "sketch": (3 + 2) * 60}
    assert quantities("delta", [MODULE], oversampling=2) == dict.fromkeys(QUANTITIES, 0) | found
    assert quantities("delta", [MODULE], oversampling=64)["sketch"] == 6 * 60, "no matrix has more columns than it has"


def test_matrices_that_the_kernels_do_not_take_count_by_themselves() -> None:
    most = LARGEST_AT_ONCE // 4
    small, large = ModuleSize(4096, 4096, (most,) * 4, 8), ModuleSize(4096, 4096, (most + 1,) * 4, 8)
    assert [quantities("core", [module])["beyond"] for module in (small, large)] == [0, (4 * most + 4) ** 3]
    assert quantities("delta", [large] * 2)["beyond"] == 2 * (4 * most + 4) ** 3


@pytest.mark.parametrize("space", ["core", "knots", "delta"])
def test_all_but_the_fixed_part_grows_with_the_number_of_modules(space: str) -> None:
    one, ten = quantities(space, [MODULE]), quantities(space, [MODULE] * 10)
    assert one.keys() == QUANTITIES.keys()
    assert ten == {name: value if name == "fixed" else 10 * value for name, value in one.items()}


@pytest.mark.parametrize(
    ("parameters", "key"),
    [
        ({"steps": 100, "rule": "mean"}, "ctm/core/whole"),
        ({"steps": 50, "rule": "mean"}, "ctm/core/whole/steps=50"),
        ({"steps": 100, "rule": "sum"}, "ctm/core/whole/rule=sum"),
        ({"steps": 100, "rule": "mean", "lambda": 2, "gamma": 0.5}, "ctm/core/whole"),
    ],
)
def test_what_chooses_an_algorithm_is_in_the_key(parameters: dict[str, object], key: str) -> None:
    defaults = {"steps": 100, "rule": "mean", "gamma": 1.0}
    assert case_key("ctm", "core", cut=False, parameters=parameters, defaults=defaults) == key


def test_a_cut_has_a_key_of_its_own() -> None:
    assert case_key("ties", "knots", cut=True, parameters={}, defaults={}) == "ties/knots/cut"
