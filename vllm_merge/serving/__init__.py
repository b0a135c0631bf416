# SPDX-License-Identifier: Apache-2.0
"""Everything that runs inside vLLM: the plugin, the worker's merges, names and leases. The only part that imports vllm."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "merge_request":  # imported late: it needs what only a process with vLLM has
        from vllm_merge.serving.offline import merge_request

        return merge_request
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
