# SPDX-License-Identifier: Apache-2.0
"""The guard on a recipe's measured safety: one that fell under its own floor is not served, and no experiment promotes it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from vllm_merge.recipe.schema import Recipe

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Safety(BaseModel):
    """How safe a recipe's result was measured to be, and how safe it has to be."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    floor: Share = Field(description="The least score with which the recipe is served.")
    score: Share | None = Field(
        None,
        description="The measured share of safe answers; `vllm-merge tune --safety` writes it. Without one: refused.",
    )
    measured_by: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="What measured it, on what and when, in words."
    )


def refusal(recipes: Mapping[str, "Recipe"], name: str) -> str | None:
    """Why the recipe `name` may not answer requests; None if it may, and for a name that is no recipe.

    For `serve` and for `experiment promote`. A recipe answers for itself: those that it uses are not asked.
    """
    safety = recipes[name].safety if name in recipes else None
    if safety is None:
        return None
    if safety.score is None:
        return (
            f"recipe {name!r} states a safety floor of {safety.floor:g} and no measured score; measure it with "
            "`vllm-merge tune --safety FILE`, or take `safety` out"
        )
    if safety.score >= safety.floor:
        return None
    by = f", measured by {safety.measured_by}" if safety.measured_by else ""
    return (
        f"recipe {name!r} is refused: its safety score of {safety.score:g} is under its floor of {safety.floor:g}{by}; "
        "tune it with the safety set, and serve what comes out"
    )
