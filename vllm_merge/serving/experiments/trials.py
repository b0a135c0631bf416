# SPDX-License-Identifier: Apache-2.0
"""What every API process knows of the experiments that run: their definitions, and what was decided about them since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from vllm_merge.experiments.assignment import Withdrawn
from vllm_merge.experiments.records import Decision
from vllm_merge.experiments.running import Running


@dataclass(frozen=True)
class Trials:
    """running: by name. decisions: that hold, in the order in which they were made. failed: {experiment: {arm: why}} of arms
    that could not be made.
    """

    running: Mapping[str, Running] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    failed: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def with_decisions(self, decisions: Sequence[Decision]) -> Trials:
        """With those of these that hold: a change of an experiment's definition makes an end of what was decided before."""
        return replace(self, decisions=tuple(decision for decision in decisions if self._holds(decision)))

    def _holds(self, decision: Decision) -> bool:
        running = self.running.get(decision.experiment)
        if running is None or running.version != decision.version:
            return False
        return decision.kind == "stop" or decision.arm in running.experiment.arms

    def decided(self, name: str) -> list[Decision]:
        """What holds for one experiment."""
        return [decision for decision in self.decisions if decision.experiment == name]

    def settled(self, name: str) -> Decision | None:
        """The last promotion or stop."""
        return next((d for d in reversed(self.decided(name)) if d.kind in ("promote", "stop")), None)

    def withdrawn(self, name: str) -> Withdrawn:
        """What assignment is to obey."""
        experiment = self.running[name].experiment
        settled = self.settled(name)
        breached = {d.arm: f"guardrail {d.guardrail}" for d in self.decided(name) if d.kind == "breach"}
        breached.pop(experiment.control_arm, None)  # there is nowhere to return to
        failed = dict.fromkeys(self.failed.get(name, {}), "its artifact cannot be made")
        failed.pop(experiment.control_arm, None)
        if settled is None:
            return Withdrawn(breached=breached, failed=failed)
        if settled.kind == "promote":
            return Withdrawn(settled.arm, "STATIC", "promoted", breached, failed)
        return Withdrawn(experiment.control_arm, "DISABLED", "stopped", breached, failed)

    def promotions(self) -> dict[str, str]:
        """{alias: what it is to stand for} of promoted experiments that are behind an alias."""
        moves = {}
        for name, running in self.running.items():
            settled, alias = self.settled(name), running.experiment.alias
            if settled is not None and settled.kind == "promote" and alias is not None:
                moves[alias] = running.experiment.arms[settled.arm].serve
        return moves
