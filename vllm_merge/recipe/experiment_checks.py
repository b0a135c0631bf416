# SPDX-License-Identifier: Apache-2.0
"""What an experiment says must hold together: arms, control, alias, namespace, times and guardrails."""

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations

from vllm_merge.recipe.experiments import LATENCIES, Experiment
from vllm_merge.recipe.problems import Finding, KeyPath, listed, nearest
from vllm_merge.recipe.schema import BASE, RecipeDocument

_LESS_IS_BETTER = ("errors", "refusals", *LATENCIES)


def check_experiments(document: RecipeDocument, registered: Collection[str]) -> Iterator[Finding]:
    """Every (key, message) that is wrong. registered: names of adapters that are known from elsewhere."""
    known = dict.fromkeys([*document.recipes, *document.adapters, *registered])
    for name, experiment in document.experiments.items():
        path: KeyPath = ("experiments", name)
        yield from _arms(path, experiment, document, known)
        yield from _alias(path, experiment, document)
        yield from _primary(path, experiment)
        yield from _guardrails(path, experiment)
        yield from _shadow(path, experiment)
        if experiment.start and experiment.end and experiment.start >= experiment.end:
            yield (*path, "end"), f"is {experiment.end.isoformat()}; it must be later than start"
    yield from _together(document.experiments)


def _arms(
    path: KeyPath, experiment: Experiment, document: RecipeDocument, known: Mapping[str, None]
) -> Iterator[Finding]:
    for name, arm in experiment.arms.items():
        here = (*path, "arms", name)
        if arm.serve in document.aliases:
            target = document.aliases[arm.serve]
            yield here, f"{arm.serve!r} is an alias, which may move; name what it points to, {target!r}"
        elif arm.serve not in known and arm.serve != BASE:
            hint = nearest(arm.serve, [*known, BASE])
            yield here, f"no recipe or adapter {arm.serve!r}{hint} (known: {listed([*known, BASE])})"
    if BASE not in known and all(arm.serve == BASE for arm in experiment.arms.values()):
        yield (*path, "arms"), "serve the base model alone; at least one arm serves a recipe or an adapter"
    if experiment.control is not None and experiment.control not in experiment.arms:
        hint = nearest(experiment.control, experiment.arms)
        yield (*path, "control"), f"no arm {experiment.control!r}{hint} (arms: {listed(experiment.arms)})"


def _alias(path: KeyPath, experiment: Experiment, document: RecipeDocument) -> Iterator[Finding]:
    alias = experiment.alias
    if alias is None:
        return
    if alias not in document.aliases:
        hint = nearest(alias, document.aliases)
        yield (*path, "alias"), f"no alias {alias!r}{hint} (aliases: {listed(document.aliases)})"
        return
    control = experiment.arms.get(experiment.control_arm)
    target = document.aliases[alias]
    if control is not None and control.serve != target:
        yield (
            (*path, "alias"),
            f"{alias!r} stands for {target!r}, but control serves {control.serve!r}; let control serve what the alias "
            "stands for, so that who takes no part gets what they got before",
        )


def _primary(path: KeyPath, experiment: Experiment) -> Iterator[Finding]:
    primary = experiment.primary
    if primary is not None and primary.metric in _LESS_IS_BETTER and primary.direction == "increase":
        yield (*path, "primary"), f"more {primary.metric} would win; add direction: decrease"


def _guardrails(path: KeyPath, experiment: Experiment) -> Iterator[Finding]:
    seen = set()
    for index, guardrail in enumerate(experiment.guardrails):
        here = (*path, "guardrails", index)
        if guardrail.max is guardrail.max_increase is guardrail.max_decrease is None:
            yield here, "has no bound; give max, max_increase or max_decrease"
        if guardrail.quantile is not None and guardrail.metric not in LATENCIES:
            yield (
                (*here, "quantile"),
                f"is for latencies ({listed(LATENCIES)}); {guardrail.metric} is bounded by its mean",
            )
        if guardrail.name in seen:
            yield here, f"bounds {guardrail.name} again; put all its bounds in one guardrail"
        seen.add(guardrail.name)


def _shadow(path: KeyPath, experiment: Experiment) -> Iterator[Finding]:
    shadow = experiment.shadow
    for index, arm in enumerate(shadow.arms or () if shadow is not None else ()):
        if arm not in experiment.arms:
            hint = nearest(arm, experiment.arms)
            yield (*path, "shadow", "arms", index), f"no arm {arm!r}{hint} (arms: {listed(experiment.arms)})"
    if shadow is not None and "judge" in shadow.compare and "answers" not in shadow.compare:
        yield (*path, "shadow", "compare"), "has judge without answers; the judge compares those, add answers"


def _together(experiments: Mapping[str, Experiment]) -> Iterator[Finding]:
    """Experiments at one time: no unit may be in two of a namespace, nor in two behind one alias."""
    for (first, a), (second, b) in combinations(experiments.items(), 2):
        if not _overlap((a.start, a.end), (b.start, b.end)):
            continue
        same = a.namespace is not None and b.namespace is not None and a.namespace.name == b.namespace.name
        if same and a.namespace and b.namespace and _overlap(a.namespace.range, b.namespace.range):
            yield (
                ("experiments", second, "namespace", "range"),
                f"overlaps that of {first}, {list(a.namespace.range)}; experiments of one namespace exclude each other",
            )
        elif a.alias is not None and a.alias == b.alias and not same:
            yield (
                ("experiments", second, "alias"),
                f"{first} is behind {a.alias!r} too; give both one namespace and ranges that do not overlap",
            )


def _overlap(a: tuple[object, object], b: tuple[object, object]) -> bool:
    """Of two [start, end) whose ends may be open (None)."""

    def before(end: object, start: object) -> bool:
        return end is not None and start is not None and bool(end <= start)  # type: ignore[operator]

    return not before(a[1], b[0]) and not before(b[1], a[0])
