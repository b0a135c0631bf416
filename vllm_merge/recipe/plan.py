# SPDX-License-Identifier: Apache-2.0
"""A plan: everything that a merge depends on, resolved, so that another process can run it without the recipe file.

Its digest identifies the result. It covers the contents of the adapters and of the base model, every resolved setting,
the methods' versions, the seeds and the dtype; it does not cover names, paths or anything else that changes no number.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_merge.errors import MergeError, UserInputError
from vllm_merge.recipe.continuation import RESUME, check_digits
from vllm_merge.recipe.digest import digest_of
from vllm_merge.recipe.dtypes import Dtype
from vllm_merge.recipe.file import RecipeFile
from vllm_merge.recipe.protocols import Registry
from vllm_merge.recipe.resolve import adapter_parameters, recipe_parameters

FORMAT = 1
DIGITS_IN_NAMES = 12
UNUSED = {"name", "inputs", "precondition_versions"}  # of a stage without preconditions


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PlannedAdapter(_Model):
    """A registered adapter: its absolute folder, and the content hash that it must have when it is read."""

    name: str
    path: str
    content_hash: str


class AdapterSource(_Model):
    """An input that is a registered adapter."""

    adapter: str


class StageSource(_Model):
    """An input that is the result of an earlier stage."""

    stage: str


class EnergyRank(_Model):
    """The smallest rank that keeps this share of each module's energy ‖ΔW‖²_F."""

    energy: float


class PlannedInput(_Model):
    """One input of a stage. Parameters are scalars, gradients, or filters of which the last takes every module."""

    source: AdapterSource | StageSource
    parameters: dict[str, Any]


class Stage(_Model):
    """One merge. Parameters of method and preconditions are complete, defaults filled in. rank is "auto" only where there is no max_rank: a module then keeps at most the sum of its ranks."""

    name: str
    merge_method: str
    method_version: int
    space: str
    inputs: tuple[PlannedInput, ...]
    parameters: dict[str, Any]
    precondition: tuple[dict[str, dict[str, Any]], ...]
    precondition_versions: tuple[int, ...] = ()
    rank: Literal["auto", "lossless"] | int | EnergyRank
    seed: int


class Plan(_Model):
    """The way to one artifact. kind "recipe": `stages` in order, the last is the result. kind "adapter": no merge.

    max_rank: the highest rank the server takes (None: any). dtype: of the result; stages before the last are float32.
    """

    kind: Literal["recipe", "adapter"]
    name: str
    digest: str
    adapters: dict[str, PlannedAdapter]
    stages: tuple[Stage, ...]
    dtype: Dtype
    base_model_hash: str
    max_rank: int | None

    @property
    def artifact_name(self) -> str:
        """The name of the result: `name@` and the first digits of the digest. It never stands for anything else."""
        return f"{self.name}@{self.digest[:DIGITS_IN_NAMES]}"

    def to_json(self) -> str:
        """The plan as JSON."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """The plan that `to_json` wrote. Raises MergeError for anything else, and where the digest is wrong."""
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            raise MergeError(f"this is not a plan: {error.errors(include_url=False)[0]['msg']}") from None
        if plan.digest != plan.computed_digest():
            raise MergeError(f"{plan.digest[:DIGITS_IN_NAMES]} is not the digest of plan {plan.name!r}; make it anew")
        return plan

    def computed_digest(self) -> str:
        """The digest of this plan's content."""
        identities = self.stage_identities()
        last = self.stages[-1] if self.stages else None
        contents = [adapter.content_hash for adapter in self.adapters.values()]
        return digest_of(
            {
                "format": FORMAT,
                "kind": self.kind,
                "result": identities[last.name] if last else contents,
                "base_model": self.base_model_hash,
                "dtype": self.dtype,
                # Energy is kept up to the server's rank, which is then part of what the result is.
                "max_rank": self.max_rank if last and isinstance(last.rank, EnergyRank) else None,
            }
        )

    def stage_identities(self) -> dict[str, str]:
        """The digest of each stage's settings and inputs, which is what the stage's result is called by later ones."""
        identities: dict[str, str] = {}
        for stage in self.stages:
            identities[stage.name] = digest_of(self._resolved(stage, identities))
        return identities

    def _resolved(self, stage: Stage, identities: Mapping[str, str]) -> dict[str, Any]:
        def identity(source: AdapterSource | StageSource) -> dict[str, str]:
            if isinstance(source, AdapterSource):
                return {"adapter": self.adapters[source.adapter].content_hash}
            return {"stage": identities[source.stage]}

        return {
            **stage.model_dump(exclude={"name", "inputs"} if stage.precondition else UNUSED),
            "inputs": [{"source": identity(item.source), "parameters": item.parameters} for item in stage.inputs],
        }


def make_plan(
    file: RecipeFile,
    name: str,
    *,
    registry: Registry,
    adapter_hashes: Mapping[str, str],
    base_model_hash: str,
    max_rank: int | None,
    dtype: Dtype,
) -> Plan:
    """The plan of the recipe `name` of `file`, an alias of one included; of an adapter's name, `make_adapter_plan`.

    adapter_hashes: the content hash of every adapter the recipe uses. max_rank: what `rank: auto` becomes; without one
    it stays, and each module keeps at most the sum of its adapters' ranks. Raises UserInputError for an unknown name,
    and for a rank that is above max_rank.
    """
    name = file.target(name)
    if name not in file.recipes:
        return make_adapter_plan(
            file, name, adapter_hashes=adapter_hashes, base_model_hash=base_model_hash, max_rank=max_rank, dtype=dtype
        )

    def planned(recipe: str) -> Plan:
        stages = tuple(_stage(file, stage, registry, max_rank) for stage in file.stage_order(recipe))
        sources = [item.source for stage in stages for item in stage.inputs]
        used = sorted({source.adapter for source in sources if isinstance(source, AdapterSource)})
        return _with_digest(
            Plan(
                kind="recipe",
                name=recipe,
                digest="",
                adapters={adapter: _planned(file, adapter, adapter_hashes) for adapter in used},
                stages=stages,
                dtype=dtype,
                base_model_hash=base_model_hash,
                max_rank=max_rank,
            )
        )

    def digest(earlier: str) -> str:
        if earlier in file.recipes:
            return planned(earlier).digest
        return make_adapter_plan(
            file,
            earlier,
            adapter_hashes=adapter_hashes,
            base_model_hash=base_model_hash,
            max_rank=max_rank,
            dtype=dtype,
        ).digest

    plan = planned(name)
    rank = plan.stages[-1].rank
    if isinstance(rank, int) and max_rank is not None and rank > max_rank:
        raise UserInputError(
            f"{file.path}: recipes.{name}.rank: {rank} is above the maximum LoRA rank {max_rank}; "
            "lower it, use auto, or raise the maximum"
        )
    check_digits(file, [stage.name for stage in plan.stages], digest)
    return plan


def make_adapter_plan(
    file: RecipeFile,
    name: str,
    *,
    adapter_hashes: Mapping[str, str],
    base_model_hash: str,
    max_rank: int | None,
    dtype: Dtype,
) -> Plan:
    """The plan of a registered adapter by itself: it is served as it is, its scaling folded, in `dtype`."""
    return _with_digest(
        Plan(
            kind="adapter",
            name=name,
            digest="",
            adapters={name: _planned(file, name, adapter_hashes)},
            stages=(),
            dtype=dtype,
            base_model_hash=base_model_hash,
            max_rank=max_rank,
        )
    )


def _with_digest(plan: Plan) -> Plan:
    return plan.model_copy(update={"digest": plan.computed_digest()})


def _stage(file: RecipeFile, name: str, registry: Registry, max_rank: int | None) -> Stage:
    recipe = file.recipes[name]
    spec = registry.get(recipe.merge_method)

    def source(of: str) -> AdapterSource | StageSource:
        return StageSource(stage=of) if of in file.recipes else AdapterSource(adapter=of)

    inputs = [
        PlannedInput(
            source=source(item.adapter), parameters=adapter_parameters(spec, item.parameters, recipe.parameters)
        )
        for item in recipe.adapters
    ]
    resume = {}
    if recipe.continued is not None:
        # The recipe's weights are of the tasks that it adds; what they are added to stays as it is.
        earlier = PlannedInput(source=source(recipe.continued), parameters=adapter_parameters(spec, {}, {}))
        inputs.insert(0, earlier)
        resume = {RESUME: True}
    return Stage(
        name=name,
        merge_method=spec.name,
        method_version=spec.version,
        space=recipe.space or spec.default_space,
        inputs=tuple(inputs),
        parameters=recipe_parameters(spec, recipe.parameters | resume),
        precondition=tuple(
            {step: registry.precondition(step).complete(given)}
            for entry in recipe.precondition
            for step, given in entry.items()
        ),
        precondition_versions=tuple(registry.precondition(step).version for e in recipe.precondition for step in e),
        rank=_rank(recipe.rank, max_rank),
        seed=recipe.seed,
    )


def _rank(rank: Any, max_rank: int | None) -> Literal["auto", "lossless"] | int | EnergyRank:
    if rank == "auto" and max_rank is not None:
        return max_rank
    return EnergyRank(energy=rank["energy"]) if isinstance(rank, dict) else rank


def _planned(file: RecipeFile, name: str, hashes: Mapping[str, str]) -> PlannedAdapter:
    if name not in file.adapters or name not in hashes:
        raise UserInputError(f"{file.path}: adapter {name!r} is not registered; give it a path under `adapters:`")
    path = file.adapters[name].path
    if not PurePath(path).is_absolute():
        raise UserInputError(f"{file.path}: adapters.{name}.path: {path} is not on this machine yet; fetch it first")
    return PlannedAdapter(name=name, path=path, content_hash=hashes[name])
