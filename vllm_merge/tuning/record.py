# SPDX-License-Identifier: Apache-2.0
"""The record of a run: what was asked, how it went, what came out, and from what; in tuning.json and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.evaluation.scores import Score, Scores
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.plan import Plan
from vllm_merge.tuning import report
from vllm_merge.tuning.data import PromptSet
from vllm_merge.tuning.learner import Learned
from vllm_merge.tuning.methods import Settings
from vllm_merge.tuning.run import Ended
from vllm_merge.tuning.start import Start

RECORD_FILE = "tuning.json"


@dataclass(frozen=True)
class Request:
    """What is tuned, by what, on what. floor: of the safety score, which is then written into the recipe."""

    file: RecipeFile
    plan: Plan
    model_path: str
    settings: Settings
    data: PromptSet
    safety: PromptSet | None
    floor: float | None
    output: Path
    device: str
    chat: bool = False
    resume: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What a run must have in common with the one it goes on from."""
        settings = asdict(self.settings)
        return {
            "recipe": self.plan.digest,
            "data": self.data.sha256,
            "prompts": len(self.data.prompts),
            "safety": None if self.safety is None else self.safety.sha256,
            "method": self.settings.method.name,
            "chat": self.chat,
            **{name: settings[name] for name in settings if name not in ("method", "steps")},
        }


@dataclass(frozen=True)
class Scored:
    """Of one merge; None without the data for it."""

    accuracy: Scores | None
    safety: Score | None


def head_of(request: Request) -> list[str]:
    """The sentences at the head of the recipe file."""
    data, settings = request.data, request.settings
    return [
        f"Learned by `vllm-merge tune --method {settings.method.name}` from recipe {request.plan.name!r} of "
        f"{request.file.path.name} and {len(data.prompts)} prompts of {data.path.name}; seed {settings.seed}. "
        f"It needs no data any more. {RECORD_FILE} has how it was learned, {report.REPORT_FILE} what came out."
    ]


def by_module(start: Start, learned: Learned) -> dict[str, dict[str, float]]:
    """{adapter: {module: weight}}, of blocks {source: {module: λ}}."""
    if learned.blocks is not None:
        return {source.name: learned.blocks.taken(source) for source in learned.blocks.used}
    if learned.weights is None:
        return {}
    columns = learned.weights.mT.tolist()
    return {
        adapter.name: {m: w for m, w in zip(start.modules, column, strict=True) if m in adapter.factors}
        for adapter, column in zip(start.adapters, columns, strict=True)
    }


def facts_of(
    request: Request,
    name: str,
    plan: Plan,
    ended: Ended,
    planned: int,
    notes: list[str],
    before: Scored,
    after: Scored,
) -> dict[str, Any]:
    settings, progress = request.settings, ended.progress
    facts: dict[str, Any] = {
        "name": name,
        "artifact": plan.artifact_name,
        "digest": plan.digest,
        "from": {"recipe": request.plan.name, "digest": request.plan.digest},
        "method": settings.method.name,
        "reference": settings.method.reference,
        "settings": {key: value for key, value in asdict(settings).items() if key != "method"},
        "data": _about(request.data),
        "device": request.device,
        "run": {
            "objective": settings.aim
            if request.safety is None or settings.objectives
            else f"safety + {settings.alpha:g} {settings.aim}",
            "start": progress.start,
            "best": progress.best,
            "best_step": progress.best_step,
            "steps": progress.done,
            "planned": planned,
            "stopped": ended.stopped,
            "failure": ended.failure,
            "seconds": progress.seconds,
            "history": progress.history,
        },
        "notes": notes,
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    if before.accuracy is not None and after.accuracy is not None:
        facts["accuracy"] = {"start": before.accuracy.to_dict(), "learned": after.accuracy.to_dict()}
    if request.safety is not None and before.safety is not None and after.safety is not None:
        facts["safety"] = {**_about(request.safety), "start": asdict(before.safety), "learned": asdict(after.safety)}
    return facts


def _about(data: PromptSet) -> dict[str, Any]:
    return {"file": data.path.name, "sha256": data.sha256, "prompts": len(data.prompts), "answered": data.answered}


def write_record(folder: Path, facts: Mapping[str, Any], weights: Mapping[str, Mapping[str, float]]) -> None:
    """tuning.json, the plots and the report, the files for people without plots where matplotlib is not installed."""
    try:
        plots = report.plot(folder, facts, weights)
    except UserInputError:
        plots = []
    for name, text in (
        (RECORD_FILE, json.dumps(facts, indent=1, ensure_ascii=False) + "\n"),
        (report.REPORT_FILE, report.page(facts, plots)),
    ):
        beside = folder / f".{name}"
        beside.write_text(text, encoding="utf-8")
        beside.replace(folder / name)
