# SPDX-License-Identifier: Apache-2.0
"""Plans: what they say, and what their digest stands for."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.recipe.bounds import stage_bounds
from vllm_merge.recipe.digest import canonical_json
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.plan import Plan, make_adapter_plan, make_plan

MakePlan = Callable[..., Plan]

TEXT = """\
version: 1
adapters: {a: {path: /a}, b: {path: /b}}
recipes:
  r:
    merge_method: ties
    adapters:
      - {adapter: a, parameters: {weight: 0.5}}
      - {adapter: b}
    parameters: {lambda: 0.6}
    rank: auto
    seed: 3
"""
STAGED = """\
version: 1
adapters: {a: {path: /a}, b: {path: /b}}
recipes:
  inner: {merge_method: ties, adapters: [{adapter: a}, {adapter: b}], rank: RANK}
  r: {merge_method: linear, adapters: [{adapter: inner}, {adapter: a}], rank: RANK}
"""


def test_content(plan: MakePlan) -> None:
    found = plan(TEXT, max_rank=16)
    assert json.loads(found.to_json()) == {
        "kind": "recipe",
        "name": "r",
        "digest": found.digest,
        "adapters": {
            "a": {"name": "a", "path": "/a", "content_hash": "hash of /a"},
            "b": {"name": "b", "path": "/b", "content_hash": "hash of /b"},
        },
        "stages": [
            {
                "name": "r",
                "merge_method": "ties",
                "method_version": 2,
                "space": "knots",
                "inputs": [
                    {"source": {"adapter": "a"}, "parameters": {"weight": 0.5, "density": 0.2}},
                    {"source": {"adapter": "b"}, "parameters": {"weight": 1.0, "density": 0.2}},
                ],
                "parameters": {"normalize": True, "lambda": 0.6},
                "precondition": [],
                "precondition_versions": [],
                "rank": 16,
                "seed": 3,
            }
        ],
        "dtype": "float32",
        "base_model_hash": "base",
        "max_rank": 16,
    }
    assert len(found.digest) == 64
    assert found.artifact_name == f"r@{found.digest[:12]}"


def test_stages(plan: MakePlan) -> None:
    found = plan(STAGED.replace("RANK", "auto"), max_rank=8)
    assert [(stage.name, stage.rank) for stage in found.stages] == [("inner", 8), ("r", 8)]
    assert found.stages[1].inputs[0].source.model_dump() == {"stage": "inner"}
    assert list(found.adapters) == ["a", "b"]


@pytest.mark.parametrize("text", [TEXT, STAGED.replace("RANK", "{energy: 0.9}")])
def test_json_is_the_whole_plan(plan: MakePlan, text: str) -> None:
    found = plan(text, max_rank=16)
    assert Plan.from_json(found.to_json()) == found


def test_json_that_was_changed_is_refused(plan: MakePlan) -> None:
    found = plan(TEXT)
    changed = found.to_json().replace('"weight":0.5', '"weight":0.6')
    assert changed != found.to_json()
    with pytest.raises(MergeError, match=rf"^{found.digest[:12]} is not the digest of plan 'r'; make it anew"):
        Plan.from_json(changed)
    with pytest.raises(MergeError, match=r"^this is not a plan: Field required$"):
        Plan.from_json("{}")


SAME = {
    "adapters renamed": TEXT.replace("{a: {", "{x: {").replace("adapter: a,", "adapter: x,"),
    "recipe renamed": TEXT.replace("  r:", "  other:"),
    "keys in another order": TEXT.replace("    merge_method: ties\n", "") + "    merge_method: ties\n",
    "defaults written out": TEXT + "    space: knots\n    load: lazy\n    precondition: []\n",
    "how it is served": TEXT + "    on_error: stop\n    on_miss: fallback\n    fallback: a\n",
    "density written out": TEXT.replace("{lambda: 0.6}", "{normalize: true, density: 0.2, lambda: 0.6}"),
    "integer for a float": TEXT.replace("{adapter: b}", "{adapter: b, parameters: {weight: 1}}"),
    "flat gradient": TEXT.replace("weight: 0.5", "weight: [0.5, 0.5]"),
    "filter for everything": TEXT.replace("weight: 0.5", "weight: [{filter: '*', value: 0.5}]"),
    "comments and spaces": "# a comment\n" + TEXT.replace("{lambda: 0.6}", "{  lambda:   6.0e-1  }"),
    "unused recipe": TEXT + "  unused: {merge_method: linear, adapters: [{adapter: b}]}\n",
}
OTHER = {
    "weight": TEXT.replace("weight: 0.5", "weight: 0.6"),
    "gradient": TEXT.replace("weight: 0.5", "weight: [0.5, 0.6]"),
    "lambda": TEXT.replace("0.6", "0.7"),
    "rank": TEXT.replace("rank: auto", "rank: 4"),
    "lossless": TEXT.replace("rank: auto", "rank: lossless"),
    "energy": TEXT.replace("rank: auto", "rank: {energy: 0.5}"),
    "seed": TEXT.replace("seed: 3", "seed: 4"),
    "space": TEXT + "    space: delta\n",
    "method": TEXT.replace("ties", "linear"),
    "order of inputs": TEXT.replace("adapter: a,", "adapter: b,").replace("{adapter: b}", "{adapter: a}"),
}


@pytest.mark.parametrize("case", SAME)
def test_digest_is_the_same(case: str, plan: MakePlan) -> None:
    assert SAME[case] != TEXT
    name = "other" if "other:" in SAME[case] else "r"
    assert plan(SAME[case], name).digest == plan(TEXT).digest


@pytest.mark.parametrize("case", OTHER)
def test_digest_is_another(case: str, plan: MakePlan) -> None:
    assert plan(OTHER[case]).digest != plan(TEXT).digest


@pytest.mark.parametrize(
    "options",
    [
        {"adapter_hashes": {"a": "hash of /a", "b": "other"}},
        {"base_model_hash": "other"},
        {"dtype": "bfloat16"},
        {"max_rank": 16},
    ],
)
def test_digest_depends_on(options: dict[str, Any], plan: MakePlan) -> None:
    assert plan(TEXT, **options).digest != plan(TEXT).digest


def test_digest_depends_on_the_methods_version(plan: MakePlan, registry: Any) -> None:
    before = plan(TEXT).digest
    registry.methods["ties"] = replace(registry.methods["ties"], version=3)
    assert plan(TEXT).digest != before


def test_digest_of_the_server_rank(plan: MakePlan) -> None:
    """max_rank enters where it changes the result: through auto and energy, not through a number of one's own."""
    fixed, energy = TEXT.replace("auto", "4"), TEXT.replace("auto", "{energy: 0.9}")
    assert plan(fixed, max_rank=8).digest == plan(fixed, max_rank=16).digest
    assert plan(energy, max_rank=8).digest != plan(energy, max_rank=16).digest
    assert plan(TEXT, max_rank=4).digest == plan(fixed, max_rank=8).digest


def test_digest_reaches_through_stages(plan: MakePlan) -> None:
    text = STAGED.replace("RANK", "auto")
    assert plan(text).digest == plan(text.replace("inner", "renamed")).digest
    assert (
        plan(text).digest != plan(text.replace("[{adapter: a}, {adapter: b}]", "[{adapter: a}, {adapter: a}]")).digest
    )


def test_digest_depends_on_preconditions_with_their_defaults_and_versions(plan: MakePlan, registry: Any) -> None:
    def digest(entries: str) -> str:
        return plan(TEXT + f"    precondition: [{entries}]\n").digest

    default = digest("cap")
    assert plan(TEXT + "    precondition: [cap]\n").stages[0].precondition == ({"cap": {"mads": 3.0}},)
    assert default == digest("{cap: {mads: 3}}")
    assert len({plan(TEXT).digest, default, digest("{cap: {mads: 2}}"), digest("cap, cap")}) == 4
    registry.preconditions["cap"] = replace(registry.preconditions["cap"], version=2)
    assert digest("cap") != default
    assert digest("") == plan(TEXT).digest


def test_adapter_plan(load: Callable[[str], RecipeFile], registry: Any) -> None:
    file = load(TEXT + "aliases: {raw: a}\n")
    options: dict[str, Any] = {
        "adapter_hashes": {"a": "1", "b": "1"},
        "base_model_hash": "base",
        "max_rank": 8,
        "dtype": "float32",
    }
    found = make_adapter_plan(file, "a", **options)
    assert (found.kind, found.stages, list(found.adapters)) == ("adapter", (), ["a"])
    assert make_plan(file, "raw", registry=registry, **options) == found
    assert make_adapter_plan(file, "b", **options).digest == found.digest  # the same content
    for change in ({"adapter_hashes": {"a": "2"}}, {"base_model_hash": "x"}, {"dtype": "float16"}):
        assert make_adapter_plan(file, "a", **options | change).digest != found.digest
    assert Plan.from_json(found.to_json()) == found


def test_refusals(plan: MakePlan) -> None:
    with pytest.raises(UserInputError) as caught:
        plan(TEXT.replace("auto", "32"), max_rank=16)
    assert str(caught.value) == (
        "/files/r.yaml: recipes.r.rank: 32 is above the maximum LoRA rank 16; lower it, use auto, or raise the maximum"
    )
    with pytest.raises(UserInputError) as caught:
        plan(TEXT, adapter_hashes={"a": "x"})
    assert str(caught.value) == ("/files/r.yaml: adapter 'b' is not registered; give it a path under `adapters:`")
    with pytest.raises(UserInputError) as caught:
        plan(TEXT.replace("path: /b", "path: org/b, revision: v1"))
    assert str(caught.value) == "/files/r.yaml: adapters.b.path: org/b is not on this machine yet; fetch it first"


SHAPES = {"a": {"q": (32, 16, 4), "up": (64, 32, 4)}, "b": {"q": (32, 16, 8)}}


@pytest.mark.parametrize(
    ("rank", "space", "max_rank", "bound"),
    [
        ("auto", "knots", None, {"q": 12, "up": 4}),
        ("lossless", "knots", 8, {"q": 12, "up": 4}),
        ("auto", "knots", 6, {"q": 6, "up": 4}),
        ("3", "knots", None, {"q": 3, "up": 3}),
        ("auto", "delta", None, {"q": 12, "up": 4}),
        ("lossless", "delta", None, {"q": 16, "up": 32}),
        ("auto", "delta", 8, {"q": 8, "up": 8}),
        ("{energy: 0.5}", "delta", 8, {"q": 8, "up": 8}),
        ("{energy: 0.5}", "delta", None, {"q": 16, "up": 32}),
    ],
)
def test_bounds(rank: str, space: str, max_rank: int | None, bound: dict[str, int], plan: MakePlan) -> None:
    text = TEXT.replace("auto", rank) + f"    space: {space}\n"
    found = stage_bounds(plan(text, max_rank=max_rank, dtype="bfloat16"), SHAPES)["r"]
    parameters = bound["q"] * (32 + 16) + bound["up"] * (64 + 32)
    assert (found.rank, found.modules, found.parameters, found.bytes) == (
        max(bound.values()),
        2,
        parameters,
        2 * parameters,
    )


def test_bounds_of_stages_add_up(plan: MakePlan) -> None:
    bounds = stage_bounds(plan(STAGED.replace("RANK", "lossless")), {"a": {"q": (99, 99, 4)}, "b": {"q": (99, 99, 8)}})
    assert {name: bound.rank for name, bound in bounds.items()} == {"inner": 12, "r": 16}


def test_canonical_json() -> None:
    assert canonical_json({"b": [1.0, 0.5, (True, None)], "a": "é"}) == '{"a":"\\u00e9","b":[1,0.5,[true,null]]}'
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json(float("nan"))
