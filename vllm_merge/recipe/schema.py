# SPDX-License-Identifier: Apache-2.0
"""The shape of a recipe file: its keys and their types. What refers to what is checked in `checks`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vllm_merge.recipe.experiments import Experiment
from vllm_merge.recipe.safety import Safety
from vllm_merge.recipe.values import MAX_SEED, Continued, ParameterValue, Precondition, Rank


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


Text = Annotated[str, Field(min_length=1)]
BASE = "base"  # as a fallback: the base model, unless a recipe or adapter has that name


class AdapterEntry(_Strict):
    """A registered adapter: a PEFT folder, or the name of a repository on the Hugging Face Hub."""

    path: Text = Field(description="PEFT folder, relative to this file, or a Hub repository such as org/name.")
    revision: Text | None = Field(None, description="Branch, tag or commit of a Hub repository.")


class RecipeInput(_Strict):
    """One adapter of a recipe."""

    adapter: Text = Field(description="Name of a registered adapter or of another recipe.")
    parameters: dict[str, ParameterValue] = Field({}, description="Its parameters; they win over the recipe's.")


class Recipe(_Strict):
    """How adapters are merged into one."""

    merge_method: Text = Field(description="The merge method; `vllm-merge methods` lists them.")
    space: Text | None = Field(None, description="delta, core, knots or factors; each method has a default.")
    adapters: list[RecipeInput] = Field(min_length=1, description="What is merged, in order.")
    precondition: list[Precondition] = Field(
        [], description="What is done to the adapters first, in order: names, or {name: {parameter: value}}."
    )
    parameters: dict[str, ParameterValue] = Field({}, description="The method's parameters.")
    continues: Continued | None = Field(
        None,
        alias="continue",
        description="An earlier result of the same sequential method that goes on: a recipe or registered adapter, or "
        "NAME@DIGITS for that one artifact of it.",
    )
    rank: Rank = "auto"
    load: Literal["eager", "lazy"] = Field(
        "eager", description="eager: merged before the server is ready. lazy: at the first request."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = Field(0, description="Seed of everything random in the merge.")
    on_miss: Literal["wait", "reject", "fallback"] = Field(
        "wait",
        description="A request while the result is not in memory: waits for it, is rejected (503), or is answered by the "
        "fallback; the merge goes on in the background.",
    )
    fallback: Text | None = Field(
        None, description="With on_miss: fallback, who answers: a recipe, an adapter, or `base` for the base model."
    )
    on_error: Literal["stop", "degraded"] = Field(
        "degraded",
        description="When an eager merge fails at the start. stop: the server does not start. degraded: the rest is served.",
    )
    safety: Safety | None = Field(
        None,
        description="Its measured safety score and the floor; under it, the recipe is neither served nor promoted.",
    )

    @property
    def continued(self) -> str | None:
        """The name of what is continued, without the digits of its digest."""
        return None if self.continues is None else self.continues.partition("@")[0]

    @property
    def sources(self) -> list[str]:
        """The names of everything that goes in, in order; what is continued comes first."""
        first = [] if self.continued is None else [self.continued]
        return [*first, *(item.adapter for item in self.adapters)]


class RecipeDocument(_Strict):
    """A recipe file."""

    version: Literal[1] = Field(description="The version of this format.")
    base_model: Text | None = Field(None, description="The model that the adapters belong to: a folder or a Hub name.")
    adapters: dict[str, AdapterEntry] = Field({}, description="Registered adapters by name.")
    recipes: dict[str, Recipe] = Field({}, description="Recipes by name; the name is what clients ask for.")
    aliases: dict[str, Text] = Field({}, description="Names that point to a recipe or an adapter.")
    experiments: dict[str, Experiment] = Field(
        {}, description="Experiments by name; clients ask for the name, and each unit gets one of the arms."
    )
