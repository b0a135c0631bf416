# SPDX-License-Identifier: Apache-2.0
"""What every API process of a server serves: one reading of the recipe file, and the aliases that were moved since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.problems import nearest, suggested
from vllm_merge.serving.control.names import Name, Names
from vllm_merge.serving.experiments.trials import Trials

Stamp = tuple[int, int, int]  # of a file: inode, size, time of change in ns
MOVES_KEPT = 16  # of one alias, to go back


@dataclass(frozen=True)
class Move:
    """Where an alias was moved to, and where the recipe file pointed it when it was."""

    target: str
    instead_of: str


@dataclass(frozen=True)
class State:
    """generation: counts what was served, from 1. stamp: of the file as it was last looked at; error: what is wrong with it,
    where it is a newer file than the one that is served. trails: what an alias stood for before its latest moves, oldest first.
    added: adapters beside the file's, {name: folder}. added_recipes: recipes beside the file's, as requests brought them.
    """

    generation: int
    names: Names
    stamp: Stamp | None = None
    error: str | None = None
    moved: Mapping[str, Move] = field(default_factory=dict)
    trials: Trials = field(default_factory=Trials)
    trails: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)
    added_recipes: Mapping[str, Any] = field(default_factory=dict)

    def reread(self, names: Names, stamp: Stamp | None, trials: Trials | None = None) -> State:
        """After a new reading of the file. A move stays until the file points its alias elsewhere than it did then."""
        aliases, moved = names.recipes.aliases, {}
        for alias, move in self.moved.items():
            if aliases.get(alias) == move.instead_of and move.target in names.names:
                moved[alias] = move
        same = {alias for alias, target in self.names.recipes.aliases.items() if aliases.get(alias) == target}
        trails = {
            alias: kept
            for alias, trail in self.trails.items()
            if alias in same and (kept := tuple(target for target in trail if target in names.names))
        }
        state = State(
            self.generation + 1,
            _with_moves(names, moved),
            stamp,
            None,
            moved,
            self.trials,
            trails=trails,
            added=self.added,
            added_recipes=self.added_recipes,
        )
        return state.with_trials(trials or Trials())

    def refused(self, error: str, stamp: Stamp | None) -> State:
        """After a reading that changes nothing."""
        return replace(self, stamp=stamp, error=error)

    def with_move(self, alias: str, target: str) -> State:
        """With `alias` standing for the recipe or adapter `target`; self if it does. Raises UserInputError."""
        aliases = self.names.recipes.aliases
        self.check_alias(alias)
        targets = [name for name, known in self.names.names.items() if known.kind not in ("alias", "experiment")]
        if target not in targets:
            raise UserInputError(f"there is no recipe or adapter {target!r}{nearest(target, targets)}")
        if target == self.target(alias):
            return self
        trail = (*self.trails.get(alias, ()), self.target(alias))[-MOVES_KEPT:]
        moved = {**self.moved, alias: Move(target, aliases[alias])}
        if target == aliases[alias]:
            del moved[alias]
        return replace(
            self,
            generation=self.generation + 1,
            names=_with_moves(self.names, {alias: Move(target, aliases[alias])}),
            moved=moved,
            trails={**self.trails, alias: trail},
        )

    def with_move_back(self, alias: str) -> State:
        """With `alias` standing for what it stood for before its latest move. Raises UserInputError."""
        self.check_alias(alias)
        before = self.before(alias)
        if before is None:
            raise UserInputError(f"alias {alias!r} was not moved: it stands for {self.target(alias)!r}")
        return replace(self.with_move(alias, before), trails={**self.trails, alias: self.trails[alias][:-1]})

    def with_trials(self, trials: Trials) -> State:
        """With these experiments, and the aliases of those that were promoted since standing for the winners."""
        state, before = replace(self, trials=trials), self.trials.promotions()
        for alias, target in trials.promotions().items():
            known = state.names.names.get(target)
            if target != before.get(alias) and known is not None:  # no alias stands for the base model
                state = replace(state.with_move(alias, target), generation=self.generation)
        return state

    def target(self, alias: str) -> str:
        """The recipe or adapter that an alias stands for."""
        move = self.moved.get(alias)
        return move.target if move is not None else self.names.recipes.aliases[alias]

    def before(self, alias: str) -> str | None:
        """What `with_move_back` returns an alias to; None where it was not moved."""
        trail = self.trails.get(alias)
        return trail[-1] if trail else None

    def check_alias(self, alias: str) -> None:
        """Raises UserInputError for an alias that the recipe file does not have."""
        aliases = self.names.recipes.aliases
        if alias not in aliases:
            raise UserInputError(f"the recipe file has no alias {alias!r}{suggested(alias, aliases, 'aliases')}")

    def to_message(self) -> dict[str, Any]:
        """The state as JSON data."""
        message: dict[str, Any] = _ADAPTER.dump_python(self, mode="json", by_alias=True)
        return message

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> State:
        """The state that `to_message` wrote."""
        return _ADAPTER.validate_python(message)


def _with_moves(names: Names, moved: Mapping[str, Move]) -> Names:
    aliases: dict[str, Name] = {
        alias: replace(names.names[move.target], name=alias, kind="alias") for alias, move in moved.items()
    }
    return replace(names, names={**names.names, **aliases})


_ADAPTER = TypeAdapter(State)
