# SPDX-License-Identifier: Apache-2.0
"""Passes over changed tiles, so that a rule's statistics can be taken of what another rule makes of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vllm_merge.adapters.factors import Adapter
from vllm_merge.algebra.cores import Cores
from vllm_merge.algebra.tiles import Passes, Tile


@dataclass(frozen=True, slots=True)
class MappedPasses:
    """`passes` with every tile changed, and with some parameters (all modules, n) in place of others."""

    passes: Passes
    change: Callable[[Tile], Tile]
    changed_parameters: Mapping[str, Tensor]

    @property
    def adapters(self) -> Sequence[Adapter]:
        """As in `passes`."""
        return self.passes.adapters

    @property
    def modules(self) -> Sequence[str]:
        """As in `passes`."""
        return self.passes.modules

    @property
    def seed(self) -> int:
        """As in `passes`."""
        return self.passes.seed

    @property
    def lambdas(self) -> Tensor:
        """As in `passes`."""
        return self.passes.lambdas

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Those of `passes`, some replaced."""
        return {**self.passes.parameters, **self.changed_parameters}

    @property
    def entries(self) -> Tensor:
        """As in `passes`."""
        return self.passes.entries

    @property
    def on_the_fly(self) -> bool:
        """As in `passes`; there `change` takes tiles without values."""
        return self.passes.on_the_fly

    def tiles(self) -> Iterator[Tile]:
        """Start a new pass over changed tiles."""
        return (self.change(tile) for tile in self.passes.tiles())

    def cores(self) -> Iterator[Cores]:
        """As in `passes`: they are not tiles."""
        return self.passes.cores()

    def hold(self, nbytes: int) -> None:
        """As in `passes`."""
        self.passes.hold(nbytes)
