# SPDX-License-Identifier: Apache-2.0
"""What the routes under /v1/merge take and give, as vLLM's /openapi.json shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from vllm_merge.recipe.values import NAME
from vllm_merge.serving.folders import Told

AnyName = Annotated[
    str, Path(max_length=200, description="A recipe, alias, adapter, artifact (`name@digits`), or a digest.")
]
AliasName = Annotated[str, Path(max_length=200, description="An alias of the recipe file.")]
FolderName = Annotated[
    str,
    Path(pattern=f"^{NAME.pattern}$", description="The name of a folder directly inside of VLLM_MERGE_ADAPTER_ROOT."),
]


RecipeName = Annotated[
    str, Path(pattern=f"^{NAME.pattern}$", description="What the recipe is to be called, or is: the model's name.")
]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Target(_Given):
    """Where an alias is to point."""

    target: str = Field(min_length=1, max_length=200, description="A recipe or adapter of the recipe file.")


class ToPlan(_Given):
    """What is to be planned."""

    merge: dict[str, Any] | str = Field(
        description="A recipe as in `extra_body`, the same as a model name (`merge:ties(sql=0.6,code=0.4)`), or the name of a "
        "recipe of the file.",
        examples=["merge:ties(sql=0.6,code=0.4;density=0.2)"],
    )


class ToAdd(_Given):
    """A recipe that is to be served."""

    merge: dict[str, Any] | str = Field(
        description="A recipe as in `extra_body`, or the same as a model name (`merge:ties(sql=0.6,code=0.4)`).",
        examples=["merge:ties(sql=0.6,code=0.4;density=0.2)"],
    )


class ChangedRecipe(BaseModel):
    """A recipe that was added or removed."""

    recipe: str
    artifact: str | None
    digest: str | None
    generation: int
    lasts: str = Field(description="Until when what was changed holds.")


class NameRow(BaseModel):
    """What a model name stands for, and in which state that is."""

    name: str
    kind: str = Field(description="recipe, alias, adapter or experiment.")
    artifact: str | None
    digest: str | None
    state: str = Field(description="ready (in memory of every worker), preparing, failed, or cold.")
    reason: Told | None = Field(description="Why it has no artifact, or why its merge failed.")
    rank: int | None = None
    bytes: int | None = None
    seconds: float | None = Field(None, description="Of its merge.")
    tier: str | None = None

    model_config = ConfigDict(extra="allow")


class FileRow(BaseModel):
    """The recipe file as it is served."""

    generation: int = Field(description="Counts what was served, from 1; the same at every API process.")
    error: Told | None = Field(description="What is wrong with a newer file, which is not served.")


class NameList(BaseModel):
    """Every name of the recipe file."""

    object: Literal["list"] = "list"
    data: list[NameRow]
    file: FileRow


class Prediction(BaseModel):
    """What a merge will take, before it is made. None: nothing like it was measured."""

    seconds: float | None
    measured_on: str | None = Field(
        description="The device whose measured merges the seconds come from, or `this server` for its own of the same kind."
    )
    workspace_bytes: int | None = Field(description="The most held at once beside adapters and result, where measured.")
    queue_seconds: int = Field(
        description="Until a merge that came now would be done, from the workers' latest merges."
    )


class StageRow(BaseModel):
    """One merge of a plan."""

    name: str
    merge_method: str
    space: str
    adapters: list[str]
    rank: int = Field(description="The most that its result can have.")
    bytes: int


class PlanAnswer(BaseModel):
    """What a recipe would make."""

    artifact: str
    digest: str = Field(description="The identity of the result: two recipes with the same digest have the same one.")
    state: str = Field(description="ready, where every worker has it in its cache already; else cold.")
    rank: int = Field(description="The most that the result can have.")
    bytes: int = Field(description="The most that its factors can have.")
    modules: int
    parameters: int
    stages: list[StageRow]
    predicted: Prediction
    warnings: list[str]
    plan: dict[str, Any] = Field(description="Every setting, defaults filled in.")


class ProblemRow(BaseModel):
    """One mistake in a recipe file."""

    line: int | None
    key: str = Field(description="Such as `recipes.support.adapters[0]`; empty for the whole file.")
    message: str


class Validation(BaseModel):
    """Whether the server would take a recipe file. Adapters' paths are not looked at."""

    valid: bool
    problems: list[ProblemRow]


class WorkerRow(BaseModel):
    """What one worker holds: `artifacts` (in the cache, with tier, bytes, leases and last use), `host`, `disk`, `slots`,
    `merging`, `queue`. A worker that is gone has `error` alone."""

    model_config = ConfigDict(extra="allow")

    artifacts: list[dict[str, Any]] = []
    bytes: int | None = None
    budget_bytes: int | None = None
    failures: dict[str, Told] = Field({}, description="Why merges failed, by digest.")
    error: Told | None = None


class WorkerList(BaseModel):
    """Every worker."""

    object: Literal["list"] = "list"
    data: list[WorkerRow]


class ReportAnswer(BaseModel):
    """What is known of an artifact that was merged. Norms are Frobenius norms."""

    name: str
    digest: str
    rank: int
    bytes: int
    seconds: float
    origin: str = Field(description="merge, or the tier that it came from: host or disk.")
    tensors_sha256: str | None
    ranks: dict[str, int] = Field(description="By module.")
    report: dict[str, Any] | None = Field(description="Of the merge; null for an adapter by itself.")


class Done(BaseModel):
    """What was done to an artifact; one of the booleans says whether there was anything to do."""

    model_config = ConfigDict(extra="allow")

    name: str
    digest: str


class AliasRow(BaseModel):
    """An alias."""

    alias: str
    target: str = Field(description="The recipe or adapter that it stands for.")
    artifact: str | None
    file_says: str | None = Field(description="What the recipe file says, where the alias was moved elsewhere.")
    before: str | None = Field(description="What `back` returns to; null where it was not moved.")


class AliasList(BaseModel):
    """Every alias."""

    object: Literal["list"] = "list"
    generation: int
    data: list[AliasRow]


class MovedAlias(AliasRow):
    """An alias after it was moved."""

    generation: int


class AdapterRow(BaseModel):
    """A registered adapter."""

    adapter: str
    origin: str = Field(description="file, vllm (--lora-modules and the like), or added (by a request).")
    artifact: str | None
    digest: str | None
    content_hash: str | None
    reason: Told | None = Field(description="Why it cannot be served.")
    warnings: list[Told] = Field(description="Where it was trained on another base model, revision or chat template.")


class AdapterList(BaseModel):
    """Every registered adapter."""

    object: Literal["list"] = "list"
    generation: int
    data: list[AdapterRow]


class ChangedAdapter(BaseModel):
    """An adapter that was added or removed."""

    adapter: str
    artifact: str | None
    generation: int


class AdHocRow(BaseModel):
    """A merge that a request brought, while it is kept."""

    artifact: str
    digest: str
    adapters: list[str]
    merge_method: str
    rank: int | None = Field(description="The result's; null while it is not in every worker's cache.")
    max_rank: int = Field(description="The most that its recipe and the server allow.")
    bytes: int = Field(description="The most that it can have.")
    idle_seconds: float


class AdHocList(BaseModel):
    """Merges of requests, and what they may cost."""

    object: Literal["list"] = "list"
    limits: dict[str, int] | None = Field(description="None: this server merges nothing for a request.")
    data: list[AdHocRow]
