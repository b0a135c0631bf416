# SPDX-License-Identifier: Apache-2.0
"""The shape of an experiment in a recipe file. What it refers to is checked in `experiment_checks`."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from vllm_merge.recipe.experiment_values import (
    ARMS_SCHEMA,
    MAX_ARMS,
    MAX_WEIGHT,
    UNITS,
    Limit,
    Moment,
    Range,
    Share,
    Unit,
    read_arms,
)

LATENCIES = ("first_token", "gap", "seconds")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Arm(_Strict):
    """One arm. Its name is its key."""

    serve: str
    weight: Annotated[float, Field(ge=0, le=MAX_WEIGHT, allow_inf_nan=False)]


class Namespace(_Strict):
    """Experiments of one namespace whose ranges do not overlap never share a unit (mutual exclusion)."""

    name: str = Field(min_length=1, max_length=64, description="What the experiments that exclude each other share.")
    range: Range = Field(description="The part of the units that this experiment may use, within [0, 1].")


class Primary(_Strict):
    """What decides, said before the first request."""

    metric: str = Field(
        min_length=1, max_length=64, description="The name of an outcome (POST /v1/merge/outcomes), or a measure."
    )
    direction: Literal["increase", "decrease"] = Field("increase", description="Which way is better.")


class Guardrail(_Strict):
    """A bound that no arm may break. An arm that does loses its traffic to control."""

    metric: Literal["errors", "refusals", "length", "first_token", "gap", "seconds"] = Field(
        description="errors and refusals: share of requests; length: tokens of an answer; first_token, gap (between two "
        "tokens), seconds (the whole answer): in seconds."
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Of a latency: bounds this quantile, not the mean."
    )
    max: Limit | None = Field(None, description="At most this.")
    max_increase: Limit | None = Field(None, description="At most this share above control: 0.2 is 20 % more.")
    max_decrease: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="At most this share below control."
    )

    @property
    def name(self) -> str:
        """What it is called where it is broken: `first_token_p99`."""
        return self.metric if self.quantile is None else f"{self.metric}_p{100 * self.quantile:g}"


class Shadow(_Strict):
    """Some requests are answered by other arms as well, for nobody but the report, when there is time for it."""

    share: Share = Field(0.05, description="The share of the requests that take part.")
    arms: list[str] | None = Field(
        None, min_length=1, max_length=MAX_ARMS, description="Who answers them as well; all other arms by default."
    )
    at_once: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="Requests that each API process compares at once; further ones are dropped, and counted."
    )
    busy_at: Annotated[int, Field(ge=1, le=100_000)] = Field(
        16, description="No comparison begins while so many requests of clients run in the API process."
    )
    compare: list[Literal["answers", "distributions", "judge"]] = Field(
        ["answers", "distributions"],
        min_length=1,
        max_length=3,
        description="answers: tokens, length and time; distributions: of the next token, at some places of the answer; judge: "
        "which answer the server's judge (VLLM_MERGE_JUDGE) likes better, beside answers.",
    )


Arms: TypeAlias = Annotated[dict[str, Arm], BeforeValidator(read_arms), WithJsonSchema(ARMS_SCHEMA)]


class Experiment(_Strict):
    """Several ways to answer behind one model name, and who gets which."""

    arms: Arms
    control: str | None = Field(None, description="The arm that others are compared to; the first one by default.")
    alias: str | None = Field(
        None, description="An alias whose requests take part too; promotion moves it to the winner."
    )
    unit: Unit = UNITS[0]
    coverage: Share = Field(
        1.0, description="The share of units that take part; the others get control and are not counted."
    )
    holdout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="A share of units that never take part in any experiment of the namespace, and get control."
    )
    namespace: Namespace | None = Field(None, description="Experiments of one namespace can exclude each other.")
    seed: str | None = Field(
        None, min_length=1, max_length=128, description="What the hash begins with; the experiment's name by default."
    )
    start: Moment | None = Field(None, description="Before it, everybody gets control.")
    end: Moment | None = Field(None, description="From it on, everybody gets control.")
    primary: Primary | None = Field(None, description="The metric that decides, and which way is better.")
    guardrails: list[Guardrail] = Field([], max_length=16, description="Bounds that no arm may break.")
    shadow: Shadow | None = Field(None, description="Compare arms on the same requests.")

    @property
    def control_arm(self) -> str:
        return self.control or next(iter(self.arms))

    @property
    def weights(self) -> Mapping[str, float]:
        """Each arm's share of those who take part; they add up to 1."""
        total = sum(arm.weight for arm in self.arms.values())
        return {name: arm.weight / total for name, arm in self.arms.items()}

    def runs_at(self, now: datetime) -> bool:
        return (self.start is None or self.start <= now) and (self.end is None or now < self.end)
