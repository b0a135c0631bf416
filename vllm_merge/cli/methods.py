# SPDX-License-Identifier: Apache-2.0
"""vllm-merge methods: which merge methods there are, and what each takes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_merge.cli.output import add_row, print_json, print_table, print_text, table

if TYPE_CHECKING:
    from vllm_merge.methods.registry import MethodSpec


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show this method alone, with its parameters.", metavar="NAME")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")] = False,
) -> None:
    """List the merge methods and the preconditions, or show the parameters of one method.

    \b
    Examples:
      vllm-merge methods
      vllm-merge methods ties
      vllm-merge methods --json
    """
    from vllm_merge.methods.preconditions import precondition_names
    from vllm_merge.methods.registry import default_registry

    registry = default_registry()
    if name is not None:
        _show(registry.get(name), json)
        return
    specs = [registry.get(known) for known in registry.names()]
    if json:
        print_json([_facts(spec) for spec in specs])
        return
    rows = table("method", "spaces (default first)", "summary")
    for spec in specs:
        add_row(rows, spec.name, ", ".join(_spaces(spec)), spec.summary)
    print_table(rows)
    print_text("space factors: A and B are merged apart, which is not a merge of the weight changes")
    print_text(f"preconditions: {', '.join(precondition_names()) or 'none'}")


def _show(spec: "MethodSpec", json: bool) -> None:
    from vllm_merge.methods.registry import COSTS, RANKS

    if json:
        print_json(_facts(spec))
        return
    print_text(f"{spec.name} (version {spec.version})", style="bold")
    print_text(spec.summary)
    print_text(f"reference: {spec.reference}")
    print_text(f"spaces: {', '.join(_spaces(spec))}")
    print_text(f"rank of the result: {_by_space(spec, lambda space: RANKS[spec.rank_class(space)])}")
    steps = ", in steps" if spec.iterative else ""
    print_text(f"works on: {_by_space(spec, lambda space: COSTS[spec.cost_class(space)])}{steps}")
    print_text(f"order of the adapters: {'matters' if spec.ordered else 'does not matter'}")
    if not spec.exact:
        print_text("not a merge of the weight changes: A and B are merged apart")
    rows = table("parameter", "of", "default", "allowed")
    for parameter in spec.parameters:
        owner = "adapter or recipe" if parameter.per_adapter else "recipe"
        add_row(rows, parameter.name, owner, _word(parameter.default), parameter.allowed)
    print_table(rows)


def _spaces(spec: "MethodSpec") -> list[str]:
    return [spec.default_space, *(space for space in spec.spaces if space != spec.default_space)]


def _by_space(spec: "MethodSpec", what: Callable[[str], str]) -> str:
    alike: dict[str, list[str]] = {}
    for space in _spaces(spec):
        alike.setdefault(what(space), []).append(space)
    return "; ".join(f"{words} in {', '.join(spaces)}" for words, spaces in alike.items())


def _facts(spec: "MethodSpec") -> dict[str, Any]:
    return {
        "name": spec.name,
        "version": spec.version,
        "summary": spec.summary,
        "reference": spec.reference,
        "spaces": _spaces(spec),
        "default_space": spec.default_space,
        "exact": spec.exact,
        "ordered": spec.ordered,
        "iterative": spec.iterative,
        "rank": {space: spec.rank_class(space) for space in _spaces(spec)},
        "cost": {space: spec.cost_class(space) for space in _spaces(spec)},
        "parameters": [
            {"name": p.name, "per_adapter": p.per_adapter, "default": p.default, "schema": p.json_schema}
            for p in spec.parameters
        ],
    }


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
