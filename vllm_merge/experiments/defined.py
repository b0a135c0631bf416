# SPDX-License-Identifier: Apache-2.0
"""Definitions as they are read back from the store."""

from __future__ import annotations

from pydantic import ValidationError

from vllm_merge.errors import MergeError
from vllm_merge.experiments.records import Definition
from vllm_merge.experiments.running import Running


def running_of(definition: Definition) -> Running:
    """The experiment that a definition holds. Raises MergeError for one that this version does not understand."""
    name, version = definition.experiment, definition.version
    try:
        return Running.from_document(name, version, definition.document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MergeError(
            f"experiment {name}: version {version} of its definition was written by another vllm-merge: {place}: {first['msg']}"
        ) from None
