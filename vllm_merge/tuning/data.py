# SPDX-License-Identifier: Apache-2.0
"""Prompts to learn from: one JSON object a line, {"prompt"}, with or without "answer" and "task"."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_merge.errors import UserInputError
from vllm_merge.json_lines import read_lines, read_object, require_texts
from vllm_merge.recipe.problems import listed

EXAMPLE = '{"prompt": "2 + 2 =", "answer": "4", "task": "sum"}'
MAX_PROMPTS = 1_000_000
FIELDS = ("prompt", "answer", "task")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. answer: None where it is unlabelled; task: None where the file names none. line: 1-based.

    ends: whether the answer is whole, so that its end is a part of it.
    """

    prompt: str
    answer: str | None
    task: str | None
    line: int
    ends: bool = True


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a file, in its order. sha256: of the whole file, for the record of what was learned from."""

    path: Path
    prompts: tuple[Prompt, ...]
    sha256: str

    @property
    def tasks(self) -> tuple[str | None, ...]:
        """The tasks, in the order of the file; (None,) where none is named."""
        return tuple(dict.fromkeys(prompt.task for prompt in self.prompts))

    @property
    def answered(self) -> bool:
        """Whether every prompt has its answer."""
        return all(prompt.answer is not None for prompt in self.prompts)

    def of_task(self, task: str | None) -> tuple[Prompt, ...]:
        """The prompts of one task."""
        return tuple(prompt for prompt in self.prompts if prompt.task == task)

    def first(self, count: int) -> PromptSet:
        """At most `count` prompts of each task, the first ones."""
        kept = {id(prompt) for task in self.tasks for prompt in self.of_task(task)[:count]}
        return PromptSet(self.path, tuple(prompt for prompt in self.prompts if id(prompt) in kept), self.sha256)

    def need_answers(self, why: str) -> None:
        """Raise UserInputError at the first prompt without an answer. why: what needs them, such as `--objective loss`."""
        for prompt in self.prompts:
            if prompt.answer is None:
                raise UserInputError(
                    f"{self.path}:{prompt.line}: 'answer' is missing, and {why} needs one for every prompt; "
                    f"a line is {EXAMPLE}"
                )

    def for_adapters(self, adapters: Sequence[str], why: str) -> tuple[PromptSet, list[str]]:
        """The prompts whose task is one of the adapters, and the names of the other tasks, which are left out.

        A file that names no task is of all adapters. Raises UserInputError where no task, or not every adapter, is found.
        """
        if self.tasks == (None,):
            return self, []
        known = [task for task in self.tasks if task in adapters]
        if not known:
            raise UserInputError(
                f"{self.path}: none of its tasks is an adapter of the recipe, and {why} runs each adapter on the prompts of "
                f"its own task; tasks: {listed(str(task) for task in self.tasks)}; adapters: {listed(adapters)}; "
                "name the tasks after the adapters, or leave 'task' out to use every prompt for every adapter"
            )
        if missing := [adapter for adapter in adapters if adapter not in known]:
            raise UserInputError(
                f"{self.path}: has no prompts of {listed(missing)}, and {why} needs some for every adapter of the recipe; "
                "add some, or leave the adapter out of the recipe"
            )
        others = [str(task) for task in self.tasks if task not in adapters]
        prompts = tuple(prompt for prompt in self.prompts if prompt.task in adapters)
        return PromptSet(self.path, prompts, self.sha256), others


def read_prompts(path: Path, limit: int | None = None) -> PromptSet:
    """The prompts of the file, of each task at most the first `limit`. Raises UserInputError with file and line.

    Lines that are empty are passed over; a file without any prompt is an error.
    """
    digest = hashlib.sha256()
    taken: dict[str | None, int] = {}
    prompts: list[Prompt] = []
    for number, raw in read_lines(path):
        digest.update(raw)
        if not raw.strip():
            continue
        prompt = _prompt(raw, path, number)
        taken[prompt.task] = taken.get(prompt.task, 0) + 1
        if limit is None or taken[prompt.task] <= limit:
            prompts.append(prompt)
        if len(prompts) > MAX_PROMPTS:
            raise UserInputError(f"{path}:{number}: there are more than {MAX_PROMPTS:,} prompts; give --limit")
    if not prompts:
        raise UserInputError(f"{path}: has no prompts; a line is {EXAMPLE}")
    return PromptSet(path, tuple(prompts), digest.hexdigest())


def _prompt(raw: bytes, path: Path, line: int) -> Prompt:
    where, hint = f"{path}:{line}", f"; a line is {EXAMPLE}"
    fields = read_object(raw, where, hint)
    given = [name for name in ("answer", "task") if fields.get(name) is not None]
    require_texts(fields, ["prompt", *given], where, hint)
    return Prompt(fields["prompt"], fields.get("answer"), fields.get("task"), line)
