# SPDX-License-Identifier: Apache-2.0
"""Ad-hoc merges: a request that brings its own recipe, as `merge` in its body or as a model name (recipe/adhoc.py).

Off unless VLLM_MERGE_ADHOC says otherwise. The recipe names registered adapters and recipes of the file, never a path. It is
planned here, against what every API process serves, so that each of them finds the same digest by itself; what comes after
that is as for any other name, and the request goes on with the artifact's label for its model.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_merge.adapters.peft import read_shapes
from vllm_merge.errors import MergeError
from vllm_merge.methods.registry import default_registry
from vllm_merge.recipe.adhoc import PREFIX, STAGE, AdHocError, Limits, Written, check_size, check_written, parse_name
from vllm_merge.recipe.bounds import Shapes, stage_bounds
from vllm_merge.recipe.plan import Plan, make_plan
from vllm_merge.recipe.schema import Recipe
from vllm_merge.recipe_files import check_precondition
from vllm_merge.serving.control.control import Message
from vllm_merge.serving.control.front import FrontDoor
from vllm_merge.serving.control.names import Names
from vllm_merge.serving.control.published import Published
from vllm_merge.serving.requests.adhoc_table import ADHOC, EVENT, AdHocTable, QuotaExceeded, content_hashes
from vllm_merge.serving.requests.bodies import Asked
from vllm_merge.serving.requests.refusals import Refused
from vllm_merge.serving.settings import ADHOC_VARIABLE, AdHocSettings

logger = logging.getLogger("vllm_merge")

MERGE = "merge"  # the key in a request's body
PLANS_KEPT = 256
RETRY_SECONDS = 5
SWEEPS = 10  # within the time after which a merge is forgotten
LONGEST_SWEEP = 10.0  # seconds

_OFF = f"this server merges nothing for a request; whoever runs it can allow it with {ADHOC_VARIABLE}=on"
_UNGUARDED = "merges of requests are for routes under /v1/, where vLLM checks API keys; use one of these, or a label"
_GONE = "merges of requests are forgotten when they are not used, or their adapters change; send the recipe again"
_LABEL = re.compile(ADHOC + r"@[0-9a-f]{12}")


async def admit(state: Any, asked: Asked, *, guarded: bool) -> Refused | None:
    """Let a request that brings a recipe ask for the recipe's artifact instead; why not, where it may not.

    state: of the application. Requests without a recipe stay as they are, and what is on the server already goes before.
    guarded: whether vLLM has looked at the request's API key; else whoever has none could use up what merges may cost.
    """
    document, model = asked.document, asked.model or ""
    if document is None or not (MERGE in document or model.startswith((PREFIX, f"{ADHOC}@"))):
        return None
    models = state.openai_serving_models
    merges: AdHocMerges | None = getattr(state, "vllm_merge_adhoc", None)
    try:
        if MERGE in document or (model.startswith(PREFIX) and not _served(models, model)):
            if merges is None or not guarded:
                why = _OFF if merges is None else _UNGUARDED
                raise Refused(400, "invalid_request_error", MERGE if MERGE in document else "model", why)
            label = await merges.label_of(document, model)
            asked.replace({key: value for key, value in document.items() if key != MERGE} | {"model": label})
        elif _LABEL.fullmatch(model) and not (merges is not None and merges.use(model)) and not _served(models, model):
            raise Refused(404, "not_found_error", "model", f"The model `{model}` does not exist: {_GONE}")
    except Refused as refused:
        return refused
    return None


def _served(models: Any, name: str) -> bool:
    return name in models.lora_requests or any(name == base.name for base in models.base_model_paths)


class AdHocMerges:
    """The merges of requests at one API process."""

    def __init__(self, front: FrontDoor, models: Any, published: Published, settings: AdHocSettings) -> None:
        self.table = AdHocTable(front, models, settings)
        self._facts, self._published = front.links.all[0].facts, published
        self._planned: OrderedDict[str, tuple[Recipe, Plan]] = OrderedDict()  # by the recipe's text, for `_names`
        self._names: Names | None = None
        self._shapes: dict[str, Shapes] = {}  # by content hash

    async def label_of(self, document: Mapping[str, Any], model: str) -> str:
        """The label of the artifact that a request's recipe stands for, which is kept from now on. Raises Refused."""
        try:
            if MERGE in document and model.startswith(PREFIX):
                raise AdHocError("model", "is a recipe, and the request has `merge` as well; send one of the two")
            recipe, plan = await self._kept(Written(document[MERGE]) if MERGE in document else parse_name(model))
        except AdHocError as error:
            raise Refused(400, "invalid_request_error", error.param, str(error)) from None
        except QuotaExceeded as error:
            raise Refused(429, "rate_limit_error", MERGE, f"{error}; try again later", error.retry_after) from None
        except MergeError as error:
            logger.error("a request's recipe cannot be merged: %s", error)
            raise Refused(503, "merge_unavailable", MERGE, str(error), RETRY_SECONDS) from None
        self.table.use(plan.digest, recipe.on_miss, recipe.fallback)
        return plan.artifact_name

    def use(self, label: str) -> bool:
        """A request asks for an artifact by its label; says whether that is here."""
        self._follow()
        entry = next((entry for entry in self.table.entries() if entry.label == label), None)
        if entry is not None:
            self.table.use(entry.plan.digest)
        return entry is not None

    def on_event(self, event: Message) -> None:
        """What the control line says."""
        if event["event"] == EVENT:
            self._follow()
            self.table.on_event(event)

    async def watch(self) -> None:
        """Forget what nobody uses, for as long as the server runs."""
        while True:
            await asyncio.sleep(min(self.table.settings.idle / SWEEPS, LONGEST_SWEEP))
            self._follow()
            self.table.sweep()

    def _follow(self) -> None:
        names = self._published.state.names
        if names is not self._names:
            self._names = names
            self._planned.clear()
        self.table.follow(names)

    def _plan(self, written: Written) -> tuple[Recipe, Plan]:
        """Raises AdHocError."""
        rank = min(self.table.settings.rank or self._facts["max_lora_rank"], self._facts["max_lora_rank"])
        limits = Limits(rank, self.table.settings.adapters)
        check_size(written, limits)
        text = json.dumps(written.recipe, sort_keys=True)
        if text in self._planned:
            self._planned.move_to_end(text)
            return self._planned[text]
        names = self._published.state.names
        planned = self._planned[text] = plan_written(written, names, self._facts, limits)
        if len(self._planned) > PLANS_KEPT:
            self._planned.popitem(last=False)
        return planned

    async def _kept(self, written: Written) -> tuple[Recipe, Plan]:
        """The recipe and its plan, whose artifact is kept from now on. Raises AdHocError, QuotaExceeded, MergeError."""
        while True:
            self._follow()
            recipe, plan = self._plan(written)
            if self.table.get(plan.digest) is not None:
                return recipe, plan
            nbytes = await asyncio.to_thread(self._bound, plan)
            if nbytes > (most := self.table.settings.bytes):
                raise written.error(("rank",), f"gives a result of up to {nbytes:,} bytes; at most {most:,} here")
            # Else another request has brought it meanwhile, or adapters have changed: look again.
            if self.table.get(plan.digest) is None and self._published.state.names is self._names:
                self.table.take_in(plan, nbytes)
                return recipe, plan

    def _bound(self, plan: Plan) -> int:
        """The most bytes that the result can have. Raises MergeError where an adapter cannot be read."""
        return stage_bounds(plan, shapes_of(plan, self._shapes))[plan.stages[-1].name].bytes


def shapes_of(plan: Plan, known: dict[str, Shapes]) -> dict[str, Shapes]:
    """{adapter: {module: (d_out, d_in, rank)}} of a plan; known: by content hash, what was read before.

    Raises MergeError where an adapter cannot be read.
    """
    for name, adapter in plan.adapters.items():
        if adapter.content_hash not in known:
            known[adapter.content_hash] = read_shapes(Path(adapter.path), name).modules
    return {name: known[adapter.content_hash] for name, adapter in plan.adapters.items()}


def plan_written(written: Written, names: Names, facts: Mapping[str, Any], limits: Limits) -> tuple[Recipe, Plan]:
    """A request's recipe and its plan, for a server with these facts (a worker's answer to `hello`). Raises AdHocError."""
    registry = default_registry()
    recipe = check_written(written, names.recipes, registry, check_precondition, limits)
    for index, source in enumerate(recipe.sources):
        known = names.names.get(source)
        if known is None or known.digest is None:
            reason = known.reason if known is not None else "it cannot be read"
            raise written.error(("adapters", index, "adapter"), f"{source!r} cannot be merged: {reason}")
    plan = make_plan(
        replace(names.recipes, recipes={**names.recipes.recipes, STAGE: recipe}),
        STAGE,
        registry=registry,
        adapter_hashes=content_hashes(names),
        base_model_hash=facts["base_model_hash"],
        max_rank=limits.rank,
        dtype=facts["dtype"],
    )
    return recipe, plan.model_copy(update={"name": ADHOC})
