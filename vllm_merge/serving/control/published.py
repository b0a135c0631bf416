# SPDX-License-Identifier: Apache-2.0
"""The names as vLLM's server sees them, and how they follow the recipe file and moved aliases while the server runs.

A change is read, planned and warmed beside what is served; only then every name moves, all at once, and in every API process
before it counts (owner.py). A file that is wrong, or gone, changes nothing and is said in the log and at /v1/merge/recipes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.adhoc import Limits, Written, check_written
from vllm_merge.recipe_files import check_precondition
from vllm_merge.serving import compat
from vllm_merge.serving.control.control import ControlError, Message, WorkerLink
from vllm_merge.serving.control.front import Artifact, FrontDoor
from vllm_merge.serving.control.names import MAX_ADAPTERS, Names
from vllm_merge.serving.control.shared import SharedState
from vllm_merge.serving.control.state import Stamp, State
from vllm_merge.serving.experiments.experiments import Experiments

logger = logging.getLogger("vllm_merge")

WATCH_SECONDS = 0.5
RETRY_SECONDS = 2
MAX_ADDED = 256  # recipes beside the file's
MAX_NAME = 256  # characters of a name that vLLM was given


class Rewritten(ControlError):
    """The recipe file changes while it is read."""

    def __init__(self, config: Path) -> None:
        super().__init__("busy", f"{config.name} is being changed; ask again when that is served", RETRY_SECONDS)


class Published:
    """What a server serves: its recipe file, and its names in vLLM's table of LoRA requests.

    owner: the line to the worker that keeps the state of all API processes.
    """

    def __init__(self, front: FrontDoor, serving_models: Any, config: Path, owner: WorkerLink) -> None:
        self._front = front
        self._models = serving_models
        self._config = config
        self._ours: set[str] = set()
        self._given: dict[str, Any] = {}  # name -> the LoRARequest that vLLM made for it
        self._shared = SharedState(owner, self._adopt)
        self.experiments = Experiments(front, lambda: str(serving_models.base_model_paths[0].name))

    async def start(self) -> None:
        """Serve what other API processes serve already, or read the file; warm what is eager.

        Raises UserInputError if the file is wrong.
        """
        await self._shared.join()
        try:
            async with self._shared.turn() as found:
                if found is None:
                    stamp = stamp_of(self._config)
                    names = await self._read()
                    trials = await self.experiments.resolve(names)
                    failed = await self.experiments.arms.hold(names.recipes.experiments, names)
                    if failed:
                        logger.error("arms that are not assigned, control answers instead: %s", _no_arms(failed))
                    state = State(1, names, stamp).with_trials(replace(trials, failed=failed))
                    await self._shared.propose(state)
        except ControlError as error:
            if self._shared.state is None:
                raise
            logger.warning("%s", error)  # this process has the state; another is slow to take it over
        compat.publish(self._models, self._front.listed, self._front.owns)
        await self._front.warm_eager(self.state.names)
        await self._hold_arms(self.state.names)

    @property
    def state(self) -> State:
        """What this process serves."""
        state = self._shared.state
        assert state is not None, "start() comes first"
        return state

    @property
    def given(self) -> Collection[str]:
        """Names of the adapters that vLLM was given itself."""
        return self._given.keys()

    def as_of(self, number: int) -> State:
        """What every API process serves, by the owner's number of it."""
        return self._shared.as_of(number) or self.state

    def on_event(self, event: Message) -> None:
        self._shared.on_event(event)

    async def watch(self) -> None:
        """Follow the file for as long as the server runs.

        A file that was changed is read once two looks have found it alike: who writes it in place leaves it empty, or cut
        off where it is still YAML and only lacks recipes, for as long as the writing takes.
        """
        seen = None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                seen, before = await asyncio.to_thread(stamp_of, self._config), seen
                if seen == before:
                    await self._look(seen)
            except ControlError as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("could not look at %s", self._config.name)

    async def _look(self, seen: Stamp | None) -> None:
        """Read the file if it has changed to what was `seen`, and is that still when it is this process's turn."""
        if seen is None or seen == self.state.stamp:
            return  # a file that is gone is not a wish to serve nothing
        async with self._shared.turn():
            now = await asyncio.to_thread(stamp_of, self._config)
            if now == seen != self.state.stamp:  # else another process has read it meanwhile, or it changes again
                await self._reload(seen)

    async def _reload(self, stamp: Stamp) -> None:
        """Serve what the file says now, or keep everything and remember why not."""
        before, name = self.state, self._config.name
        try:
            names = await self._read_as_of(stamp)
            resolved = before.reread(names, stamp, await self.experiments.resolve(names))
            await self._front.warm_eager(resolved.names)  # raises for one that must not fail
            if failed := await self.experiments.arms.hold(names.recipes.experiments, names):
                raise MergeError(_no_arms(failed))
        except Rewritten:
            return  # it is read when it rests
        except MergeError as error:
            logger.error("%s was changed and is wrong; what was served before stays:\n%s", name, error)
            await self._shared.propose(before.refused(str(error), stamp))
            return
        except Exception as error:
            logger.exception("%s was changed and could not be served", name)
            await self._shared.propose(before.refused(f"{type(error).__name__}: {error}", stamp))
            return
        await self._shared.propose(resolved)
        logger.info("%s was changed: generation %d is served", name, resolved.generation)

    async def _hold_arms(self, names: Names) -> None:
        """Keep the arms of these, and no others."""
        if names.recipes.experiments:
            await asyncio.to_thread(self.experiments.open_store)
        await self.experiments.arms.hold(names.recipes.experiments, names)
        await self.experiments.arms.release(names.recipes.experiments, names)

    async def take_decisions(self) -> State:
        """Let every API process obey what the store says was decided. Raises MergeError, ControlError."""
        decisions = await asyncio.to_thread(self.experiments.open_store().decisions)
        async with self._shared.turn() as before:
            assert before is not None
            trials = before.trials.with_decisions(decisions)
            if trials == before.trials:
                return before
            after = replace(before.with_trials(trials), generation=before.generation + 1)
            await self._shared.propose(after)
            return after

    async def leads(self) -> bool:
        """Whether this is the API process that does what one is to do for all."""
        return await self._shared.leads()

    async def move(self, alias: str, target: str) -> State:
        """Let an alias stand for another recipe or adapter; returns the state in which no API process answers as before.

        The target is made ready first. Raises UserInputError for a name that is none, ArtifactUnavailable for a target that
        cannot be made, ControlError if an API process does not answer.
        """
        return await self._move(alias, lambda before: before.with_move(alias, target))

    async def move_back(self, alias: str) -> State:
        """`move` to what an alias stood for before its latest move."""
        return await self._move(alias, lambda before: before.with_move_back(alias))

    async def _move(self, alias: str, moved: Callable[[State], State]) -> State:
        async with self._shared.turn() as before:
            assert before is not None
            after = moved(before)
            target = after.target(alias)
            found = self._front.find(target)
            assert found is not None, "a recipe or adapter of the state is known"
            await self._front.ready(found[0])
            if after is not before:
                await self._shared.propose(after)
                logger.info("alias %s was moved to %s: generation %d", alias, target, after.generation)
            return after

    async def add_adapter(self, name: str, folder: Path) -> State:
        """Register the PEFT folder `folder` beside the file's adapters, at every API process; `move` says what it raises."""
        async with self._shared.turn() as before:
            assert before is not None
            _check_free(before, name)
            after = await self._with(before, added={**before.added, name: str(folder)})
            await self._ready(after, name)
            await self._shared.propose(after)
            return after

    async def remove_adapter(self, name: str) -> State:
        """Forget an adapter that was added. Raises UserInputError where the file needs it, ControlError as `move`."""
        async with self._shared.turn() as before:
            assert before is not None
            if name not in before.added:
                raise UserInputError(f"adapter {name!r} was not added by a request: it is the recipe file's, or vLLM's")
            after = await self._with(before, added={n: folder for n, folder in before.added.items() if n != name})
            await self._shared.propose(after)
            return after

    async def add_recipe(self, name: str, written: Written) -> State:
        """Serve a recipe beside the file's, at every API process; it may use what the server knows.

        Raises AdHocError for a wrong recipe, and what `move` raises.
        """
        async with self._shared.turn() as before:
            assert before is not None
            _check_free(before, name)
            if len(before.added_recipes) >= MAX_ADDED:
                raise UserInputError(
                    f"{MAX_ADDED} recipes were added already; remove one, or put them into the recipe file"
                )
            limits = Limits(self._front.links.all[0].facts["max_lora_rank"], MAX_ADAPTERS)
            check_written(written, before.names.recipes, default_registry(), check_precondition, limits)
            after = await self._with(before, added_recipes={**before.added_recipes, name: written.recipe})
            await self._ready(after, name)
            await self._shared.propose(after)
            logger.info("recipe %s was added: generation %d", name, after.generation)
            return after

    async def remove_recipe(self, name: str) -> State:
        """Forget a recipe that was added. Raises UserInputError where something stands for it, ControlError as `move`."""
        async with self._shared.turn() as before:
            assert before is not None
            if name not in before.added_recipes:
                raise UserInputError(f"recipe {name!r} was not added by a request: it is the recipe file's")
            if moved := sorted(alias for alias, move in before.moved.items() if move.target == name):
                raise UserInputError(f"alias {moved[0]!r} stands for recipe {name!r}; move it elsewhere first")
            kept = {other: recipe for other, recipe in before.added_recipes.items() if other != name}
            after = await self._with(before, added_recipes=kept)
            await self._shared.propose(after)
            return after

    async def _ready(self, after: State, name: str) -> None:
        """Return once what was added can be served. Raises UserInputError where it has no artifact."""
        known = after.names.names.get(name)
        if known is None or known.digest is None:
            raise UserInputError(
                f"{name!r} cannot be served: {known.reason if known is not None else 'it cannot be read'}"
            )
        plan = after.names.plans[known.digest]
        await self._front.ready(self._front.artifacts.setdefault(known.digest, Artifact(plan)))

    async def _with(
        self,
        before: State,
        *,
        added: Mapping[str, str] | None = None,
        added_recipes: Mapping[str, Any] | None = None,
    ) -> State:
        """`before` with other adapters or recipes beside the file's, which is read for it. Raises UserInputError."""
        added = before.added if added is None else added
        added_recipes = before.added_recipes if added_recipes is None else added_recipes
        names = await self._read_as_of(before.stamp, added, added_recipes)
        return replace(before.reread(names, before.stamp, before.trials), added=added, added_recipes=added_recipes)

    async def _read_as_of(
        self,
        stamp: Stamp | None,
        added: Mapping[str, str] | None = None,
        added_recipes: Mapping[str, Any] | None = None,
    ) -> Names:
        """`_read`. Raises Rewritten where the file is not as it was any more, so that half of it may have been read."""
        try:
            names = await self._read(added, added_recipes)
        except MergeError:
            await self._check_rests(stamp)
            raise
        await self._check_rests(stamp)
        return names

    async def _check_rests(self, stamp: Stamp | None) -> None:
        if await asyncio.to_thread(stamp_of, self._config) not in (stamp, None):
            raise Rewritten(self._config)

    async def _read(
        self, added: Mapping[str, str] | None = None, added_recipes: Mapping[str, Any] | None = None
    ) -> Names:
        """Read the file. added, added_recipes: adapters and recipes beside its own; by default those of the state."""
        state = self._shared.state
        if added is None:
            added = state.added if state is not None else {}
        if added_recipes is None:
            added_recipes = state.added_recipes if state is not None else {}
        resolved = await self._front.resolve(self._config, {**self._registered(), **added}, added_recipes)
        bases = {path.name for path in self._models.base_model_paths}
        if taken := sorted(set(resolved.names) & bases):
            raise UserInputError(f"{self._config}: the name {taken[0]!r} is the served base model's; rename it here")
        return resolved

    def _registered(self) -> dict[str, str]:
        """{name: folder} of the adapters that vLLM was given: --lora-modules, /v1/load_lora_adapter, resolvers.

        Their names become ours too (our loader obeys patterns, vLLM 0.26's does not), so they are remembered until vLLM
        unloads them.
        """
        requests = self._models.lora_requests
        theirs = {name: r for name, r in requests.items() if not self._front.owns(r.lora_path)}
        self._given |= {name: request for name, request in theirs.items() if _fits_a_header(name)}
        self._given = {name: request for name, request in self._given.items() if name in requests}
        return {name: request.lora_path for name, request in self._given.items()}

    def _adopt(self, state: State) -> None:
        self._registered()  # remembers what vLLM was given before its names become ours
        before = self._shared.state
        unloaded = self._ours - set(self._models.lora_requests)
        self._front.adopt(state.names)
        self.experiments.adopt(state.trials)
        requests = self._front.lora_requests()
        if before is not None and before.stamp == state.stamp:  # the same reading: what vLLM unloaded since stays away
            requests = {name: request for name, request in requests.items() if name not in unloaded}
        self._models.lora_requests.update(requests)
        for name in self._ours - set(requests):
            if name in self._given:
                self._models.lora_requests[name] = self._given[name]
            else:
                self._models.lora_requests.pop(name, None)
        self._ours = set(requests)
        self._holding = asyncio.ensure_future(self._hold_arms(state.names))


def _no_arms(failed: Mapping[str, Mapping[str, str]]) -> str:
    reasons = [f"experiments.{name}.arms.{arm}: {why}" for name, arms in failed.items() for arm, why in arms.items()]
    return "; ".join(reasons)


def _fits_a_header(name: str) -> bool:
    """vLLM takes any text for an adapter's name; ours are in headers and logs. Others stay what they are: vLLM's."""
    return len(name) <= MAX_NAME and name.isascii() and name.isprintable()


def stamp_of(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_free(state: State, name: str) -> None:
    """Raises UserInputError where the state knows the name."""
    if (known := state.names.names.get(name)) is not None:
        raise UserInputError(f"the name {name!r} is taken, by {known.kind} {name!r}")
