# SPDX-License-Identifier: Apache-2.0
"""What to be careful about before a plan is run: one sentence each, with what to do."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations

from vllm_merge.forecast.overlap import Overlap
from vllm_merge.recipe.plan import AdapterSource, Plan, Stage

LARGER_NORM = 5.0  # one adapter this many times as large as another decides the result alone
OPPOSED = -0.2  # adapters of different tasks are nearly orthogonal
ALIKE = 0.98


def cautions(plan: Plan, overlap: Overlap, modules: Mapping[str, Collection[str]]) -> list[str]:
    """The sentences for `plan`. modules: {adapter: its modules}."""
    return [*_norms(overlap), *_directions(plan, overlap), *cautions_of_shapes(plan, modules)]


def cautions_of_shapes(plan: Plan, modules: Mapping[str, Collection[str]]) -> list[str]:
    """Those of `cautions` that no adapter has to be read for."""
    return [*_missing(modules), *_densities(plan)]


def _norms(overlap: Overlap) -> Iterator[str]:
    norms = dict(zip(overlap.names, overlap.products().diagonal().sqrt().tolist(), strict=True))
    for name in [name for name, norm in norms.items() if norm == 0]:
        yield f"adapter {name!r} changes no weight: its factors are zero, and it is left out"
        del norms[name]
    if len(norms) < 2:
        return
    largest, smallest = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    if norms[largest] > LARGER_NORM * norms[smallest]:
        yield (
            f"adapter {largest!r} changes the weights {norms[largest] / norms[smallest]:.0f} times as much as "
            f"{smallest!r} (norms {norms[largest]:.3g} and {norms[smallest]:.3g}) and is most of "
            "their sum; balance them with `weight`"
        )


def _directions(plan: Plan, overlap: Overlap) -> Iterator[str]:
    products = overlap.products()
    norms = products.diagonal().sqrt()
    place = {name: index for index, name in enumerate(overlap.names)}
    seen: set[tuple[str, str]] = set()
    for stage in plan.stages:
        signs = {name: sign for name, sign in _signs(stage).items() if norms[place[name]] > 0}
        for one, two in combinations(signs, 2):
            i, j = place[one], place[two]
            cosine = float(products[i, j] / (norms[i] * norms[j])) * signs[one] * signs[two]
            if (one, two) in seen:
                continue
            seen.add((one, two))
            if cosine < OPPOSED:
                yield f"adapters {one!r} and {two!r} pull against each other (cosine {cosine:.2f}): they cancel in part"
            elif cosine > ALIKE:
                yield f"adapters {one!r} and {two!r} are nearly the same (cosine {cosine:.2f}): together they count double"


def _signs(stage: Stage) -> dict[str, int]:
    """The sign of each adapter's weight in a stage; 1 where it differs by module."""
    signs = {}
    for item in stage.inputs:
        if isinstance(item.source, AdapterSource):
            weight = item.parameters.get("weight", 1)
            signs[item.source.adapter] = -1 if isinstance(weight, int | float) and weight < 0 else 1
    return signs


def _missing(modules: Mapping[str, Collection[str]]) -> Iterator[str]:
    everything = dict.fromkeys(module for mine in modules.values() for module in mine)
    lacking = {name: [module for module in everything if module not in mine] for name, mine in modules.items()}
    lists = [f"{name} lacks {len(missing)} (such as {missing[0]})" for name, missing in lacking.items() if missing]
    if lists:
        yield (
            f"not every adapter has all of the {len(everything)} modules, and counts as no change where it has none: "
            f"{', '.join(lists)}"
        )


def _densities(plan: Plan) -> Iterator[str]:
    for stage in plan.stages:
        varies = any(isinstance(item.parameters.get("density"), list) for item in stage.inputs)
        if varies and stage.parameters.get("trim") == "global":
            yield (
                f"recipe {stage.name!r}: a density that differs by module is kept module by module, as with "
                "`trim: module`; a threshold over the whole model needs one density"
            )
