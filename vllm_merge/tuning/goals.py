# SPDX-License-Identifier: Apache-2.0
"""What the settings of a run make small: one goal, or several objectives side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from vllm_merge.errors import UserInputError
from vllm_merge.tuning.batches import Encoded
from vllm_merge.tuning.data import PromptSet
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.null_space import NullSpace
from vllm_merge.tuning.objective import Accuracy, Entropy, Goal, Loss, Objective, Term
from vllm_merge.tuning.start import Start

if TYPE_CHECKING:
    from vllm_merge.tuning.methods import ObjectiveName, Settings


def goal_of(settings: Settings, start: Start, model: TuningModel, data: PromptSet, safety: PromptSet | None) -> Goal:
    """The one objective on the data, and with a safety set the loss on that, to which it is added α times."""
    objective: Objective
    if settings.objective == "entropy":
        objective = Entropy(settings.answer_tokens)
    elif settings.objective == "null_space":
        objective = NullSpace(start.conditioned(), start.modules, start.device)
    else:
        objective = Loss() if settings.objective == "loss" else Accuracy()
    room = settings.answer_tokens if settings.objective == "entropy" else 0
    answers = objective.needs_answers or (data.answered and settings.objective == "entropy")
    expert = Encoded(data, model, answers=answers, room=room)
    if safety is None:
        return Goal([Term(1.0, expert, objective)])
    safety.need_answers("--safety")
    return Goal([Term(1.0, Encoded(safety, model, answers=True), Loss()), Term(settings.alpha, expert, objective)])


def goals_of(
    settings: Settings, start: Start, model: TuningModel, data: PromptSet, safety: PromptSet | None
) -> dict[str, Goal]:
    """The objectives by name: the one, or several, of which the safety set is one where it is given."""
    if not settings.objectives:
        return {settings.aim: goal_of(settings, start, model, data, safety)}
    goals: dict[str, Goal] = {}
    for name in settings.objectives:
        if name == "tasks":
            if len(data.tasks) < 2:
                raise UserInputError(
                    f"--objective tasks: {data.path} has one task, or names none; name several, or leave it out"
                )
            for task in data.tasks:
                mine = PromptSet(data.path, data.of_task(task), data.sha256)
                goals[str(task)] = goal_of(replace(settings, objective="loss"), start, model, mine, None)
        elif name != "safety":
            one = replace(settings, objective=cast("ObjectiveName", name))
            goals[name] = goal_of(one, start, model, data, None)
    if safety is not None:
        safety.need_answers("--safety")
        goals["safety"] = Goal([Term(1.0, Encoded(safety, model, answers=True), Loss())])
    return goals
