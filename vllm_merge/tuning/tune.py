# SPDX-License-Identifier: Apache-2.0
"""A whole run of `vllm-merge tune`: from a recipe and prompts to a learned recipe, its record, its report and its scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.errors import MergeError
from vllm_merge.evaluation.scores import Score
from vllm_merge.plan_runner import run_plan
from vllm_merge.recipe.plan import Plan
from vllm_merge.tuning.methods import build
from vllm_merge.tuning.model import TuningModel
from vllm_merge.tuning.record import Request, Scored, by_module, facts_of, head_of, write_record
from vllm_merge.tuning.run import Run
from vllm_merge.tuning.scoring import accuracy, answer_tokens, safety_score
from vllm_merge.tuning.start import Start
from vllm_merge.tuning.written import Writer

Notify = Callable[[str, int, int | None], None]
Replan = Callable[[Path, str], Plan]
"""The plan of a recipe of a file."""


@dataclass(frozen=True)
class Result:
    """The record (tuning.json), the recipe file, and why the run failed, empty where it did not."""

    facts: dict[str, Any]
    recipe: Path
    failure: str


def tune(request: Request, *, replan: Replan, notify: Notify, stopped: Callable[[], bool]) -> Result:
    """Run, and write recipe.yaml, tuning.json, report.md and plots into the folder.

    Nothing of an earlier result is touched before there is a better start than none: a run that fails before it has learned
    anything raises MergeError and leaves the folder's recipe as it was. Raises UserInputError for data or a recipe that
    cannot be learned from.
    """
    settings = request.settings
    notify("Loading the model", 0, None)
    model = TuningModel(request.model_path, request.device, 1, chat=request.chat)
    start = Start.of(request.plan, model.device)
    learner, notes = build(settings, start, model, request.data, request.safety)
    writer = Writer(request.file, start, settings.method, request.output.absolute(), head_of(request))
    writer.check(settings.per)
    request.output.mkdir(parents=True, exist_ok=True)
    run = Run(learner, request.output, request.identity, settings.steps or settings.method.steps)
    if request.resume:
        run.resume()

    def progress(done: int, total: int, best: float | None) -> None:
        notify(f"{settings.method.name}: best {best:.4g}" if best is not None else "Looking at the start", done, total)

    ended = run.go(progress, stopped)
    if ended.progress.best_step == 0 and (ended.failure or ended.stopped):
        reason = ended.failure or f"stopped after step {ended.progress.done} of {run.steps}"
        raise MergeError(
            f"{reason}; nothing better than the start was learned, and the recipe in {request.output} was left as it is"
        )
    if ended.progress.best_step == 0:
        notes.append("no step was better than the start: the recipe is as it was")
    notes += learner.notes()
    began = time.perf_counter()
    model.limit(answer_tokens(model, request.data, request.safety))
    scored = _Scores(request, model, notify)
    before = scored.of("the start", run_plan(request.plan, device=model.device, report="brief").factors)
    floor = _floor(request)
    # Until its score is known, a recipe with a floor is refused by the guard.
    recipe = writer.write(ended.learned, None if floor is None else {"floor": floor})
    after_plan = replan(recipe, writer.name)
    after = scored.of("what was learned", run_plan(after_plan, device=model.device, report="brief").factors)
    if floor is not None and after.safety is not None:
        writer.write(ended.learned, _safety(request, floor, after.safety))
        if after.safety.accuracy < floor:
            notes.append(
                f"the safety score of {after.safety.accuracy:.4g} is under the floor of {floor:g}: neither `serve` nor "
                "`experiment promote` takes this recipe"
            )
    elif floor is not None:
        notes.append(
            f"the recipe has a safety floor of {floor:g}, and no score without --safety: neither `serve` nor `experiment promote` "
            "takes it before one is measured"
        )
    facts = facts_of(request, writer.name, after_plan, ended, run.steps, notes, before, after)
    facts["seconds_of_scoring"] = time.perf_counter() - began
    write_record(request.output, facts, by_module(start, ended.learned))
    return Result(facts, recipe, ended.failure)


class _Scores:
    """Scores of merges by the answers that they generate."""

    def __init__(self, request: Request, model: TuningModel, notify: Notify) -> None:
        self._request, self._model, self._notify = request, model, notify

    def of(self, name: str, factors: Mapping[str, LoraFactors]) -> Scored:
        data, safety = self._request.data, self._request.safety
        right, safe = None, None
        if any(prompt.answer is not None for prompt in data.prompts):
            right = accuracy(name, self._model, factors, data, self._progress(name, len(data.prompts)))
        if safety is not None:
            safe = safety_score(self._model, factors, safety, self._progress(name, len(safety.prompts)))
        return Scored(right, safe)

    def _progress(self, name: str, total: int) -> Callable[[int], None]:
        return lambda done: self._notify(f"Scoring {name}", done, total)


def _floor(request: Request) -> float | None:
    """Of the safety score: the one that is given, or the recipe's own."""
    before = request.file.recipes[request.plan.name].safety
    return request.floor if request.floor is not None or before is None else before.floor


def _safety(request: Request, floor: float, score: Score) -> dict[str, Any]:
    """What the recipe says of its safety. The score is rounded down: rounding lets nothing under its floor pass."""
    assert request.safety is not None
    by = (
        f"vllm-merge tune, {score.total} prompts of {request.safety.path.name} (sha256 {request.safety.sha256[:12]}), "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )
    return {"floor": floor, "score": math.floor(score.accuracy * 1e4) / 1e4, "measured_by": by}
