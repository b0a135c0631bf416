# SPDX-License-Identifier: Apache-2.0
"""Markers for the annotations of a method's parameters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PerAdapter:
    """A float that every adapter (and every module) may have its own value of.

    `weight: Annotated[Tensor, PerAdapter(1.0)]` is a number in a recipe; the method receives it as a float32 tensor
    (modules, n, 1, 1) that broadcasts against the tasks' entries; a method of whole modules as float64.
    """

    default: float
