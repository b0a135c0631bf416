# SPDX-License-Identifier: Apache-2.0
"""The state of a sequential merge that its folder carries: what one more adapter is added to, beside the factors.

It stands in merge_report.json as `continuation`, and the folder's content hash covers it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_merge.errors import UserInputError

REPORT_FILE = "merge_report.json"
MAX_REPORT_BYTES = 64 * 2**20
MAX_TASKS = 100_000

_Norm = Annotated[float, Field(ge=0)]


class SequenceState(BaseModel):
    """order, norms: names and whole-model norms of the tasks so far; scale: λ of the recipe by module, divided out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    method: str
    order: Annotated[list[str], Field(min_length=1, max_length=MAX_TASKS)]
    norms: Annotated[list[_Norm], Field(min_length=1, max_length=MAX_TASKS)]
    lam: Annotated[_Norm, Field(alias="lambda")]
    scale: dict[str, float]


def read_state(folder: Path) -> dict[str, Any]:
    """The state in a folder, as the method wrote it; empty for a folder that carries none.

    Raises UserInputError where there is one and it is damaged, OSError where the file cannot be read.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        text = file.read(MAX_REPORT_BYTES + 1)
    if len(text) > MAX_REPORT_BYTES:
        raise UserInputError(f"{path}: is larger than {MAX_REPORT_BYTES:,} bytes; this is no report of a merge")
    try:
        report = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{path}: is not JSON ({error}); restore it, or remove it and merge anew") from None
    found = report.get("continuation") if isinstance(report, dict) else None
    if not found:
        return {}
    try:
        state = SequenceState.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in ("continuation", *first["loc"]))
        raise UserInputError(f"{path}: {where}: {first['msg']}; restore the file, or merge anew") from None
    if len(state.order) != len(state.norms):
        raise UserInputError(f"{path}: continuation: {len(state.order)} names for {len(state.norms)} norms; merge anew")
    return state.model_dump(by_alias=True)


def canonical_state(state: Mapping[str, object]) -> bytes:
    """What a content hash covers of a state; nothing for an empty one, so that other folders keep their hashes."""
    return json.dumps(dict(state), sort_keys=True).encode() if state else b""
