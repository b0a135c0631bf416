# SPDX-License-Identifier: Apache-2.0
"""What `vllm-merge experiment` prints and draws."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vllm_merge.cli.output import add_row, print_table, print_text, print_warnings, table
from vllm_merge.report import experiment_rows as rows

if TYPE_CHECKING:
    from vllm_merge.experiments.planner import Plan

SECTIONS = (
    ("arms", rows.arm_rows),
    ("metrics", rows.value_rows),
    ("differences from control", rows.difference_rows),
    ("latencies", rows.latency_rows),
    ("two answers to the same request", rows.paired_rows),
    ("guardrails", rows.guardrail_rows),
    ("decisions", rows.decision_rows),
)


def print_report(facts: Mapping[str, Any]) -> None:
    """The verdict first, then what it rests on."""
    print_text(f"{facts['experiment']}, {rows.version(facts)}, {facts['state']}", style="bold")
    print_text(facts["verdict"]["sentence"])
    print_warnings(rows.notes(facts))
    for name, section in SECTIONS:
        head, lines = section(facts)
        if lines:
            print_text("")
            print_text(name, style="bold")
            made = table(*head)
            for line in lines:
                add_row(made, *line)
            print_table(made)
    print_text("")
    ratio = rows.probability(facts["imbalance"]["always"])
    print_text(f"sample ratio: p = {ratio}; all intervals hold at {100 * (1 - facts['alpha']):g} % whenever one looks")


def print_plan(plan: Plan) -> None:
    """Units and days."""
    base = plan.baseline
    print_text(f"{plan.units:,} units in each of {plan.arms} arms, {plan.total:,} together", style="bold")
    print_text(
        f"to find a difference of {plan.effect:g} from {base.mean:g} with a chance of {100 * plan.power:g} %, and one "
        f"that is not there with {100 * plan.alpha:g} % at most, however often one looks"
    )
    print_text(f"looked at once, at the very end: {plan.one_look:,} units in each arm")
    if plan.days is not None:
        print_text(f"{plan.days:.1f} days")


def figures_of(facts: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """(name, figure) of everything there is to draw."""
    from vllm_merge.report.experiment_plots import experiment_figures
    from vllm_merge.report.plots import LIGHT

    return experiment_figures(facts, LIGHT)


def page_of(facts: Mapping[str, Any]) -> str:
    """The page, in HTML."""
    from vllm_merge.report.experiment_page import experiment_page

    return experiment_page(facts)
