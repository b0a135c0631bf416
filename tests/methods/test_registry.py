# SPDX-License-Identifier: Apache-2.0
"""The registry, and the parameter schema read from signatures."""

from __future__ import annotations

import pytest

from vllm_merge import UserInputError, list_methods
from vllm_merge.methods.registry import default_registry, merge_method


def test_names_and_nearest() -> None:
    registry = default_registry()
    assert {"linear", "task_arithmetic", "ties"} <= set(registry.names())
    with pytest.raises(UserInputError, match=r"unknown merge method 'tie', did you mean 'ties'\? \(known: .*linear"):
        registry.get("tie")


def test_every_method_describes_itself() -> None:
    for spec in list_methods():
        assert spec.summary
        assert spec.reference.startswith(("arXiv:", "doi:", "https://"))
        assert spec.default_space in spec.spaces
        assert {p.name for p in spec.parameters} >= {"weight", "lambda"}


def test_schema_of_ties() -> None:
    spec = default_registry().get("ties")
    assert spec.defaults(per_adapter=True) == {"weight": 1.0, "density": 0.2}
    assert spec.defaults(per_adapter=False) == {"normalize": True, "trim": "global", "lambda": 1.0}
    assert spec.parameter("density").json_schema == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "default": 0.2,
    }
    assert spec.low_rank("knots")
    assert not spec.low_rank("delta")


def test_validation_returns_only_what_was_given() -> None:
    spec = default_registry().get("ties")
    assert spec.validate("knots", {"density": 1}, per_adapter=True) == {"density": 1.0}
    assert spec.validate(None, {"density": {"m": 0.5}}, per_adapter=False) == {"density": {"m": 0.5}}


@pytest.mark.parametrize(
    ("parameters", "per_adapter", "message"),
    [
        ({"density": 0}, True, r"parameter 'density' is 0; allowed is number > 0, ≤ 1 \(default 0.2\)"),
        ({"density": {"m": 2}}, False, "for module 'm': parameter 'density' is 2"),
        ({"weight": float("nan")}, True, "parameter 'weight' is nan"),
        ({"weight": True}, True, "parameter 'weight' is True"),
        ({"trim": "row"}, False, "one of 'global', 'module'"),
        ({"trim": "global"}, True, "is one of the recipe, not of an adapter"),
        ({"densty": 0.5}, False, "has no parameter 'densty', did you mean 'density'"),
        ({"lambda": "much"}, False, "parameter 'lambda' is 'much'; allowed is number"),
    ],
)
def test_wrong_parameters(parameters: dict[str, object], per_adapter: bool, message: str) -> None:
    with pytest.raises(UserInputError, match=message):
        default_registry().get("ties").validate("knots", parameters, per_adapter)


def test_wrong_space() -> None:
    with pytest.raises(UserInputError, match="not defined in space 'factors'; allowed: knots, delta, core"):
        default_registry().get("ties").validate("factors", {}, per_adapter=False)


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        merge_method("ties", spaces=("core",), reference="arXiv:2306.01708")(lambda tile, statistics: tile.values)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("cat", "task_arithmetic"), ("svd", "task_arithmetic"), ("dare", "dare_linear")]
)
def test_a_name_of_another_tool_is_answered_with_ours(theirs: str, ours: str) -> None:
    with pytest.raises(UserInputError, match=f"unknown merge method '{theirs}'; here it is '{ours}'"):
        default_registry().get(theirs)
