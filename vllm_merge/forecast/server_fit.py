# SPDX-License-Identifier: Apache-2.0
"""Whether recipes and settings fit a server, and what to change where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_merge.forecast.server import Budget, Decoder, Parallel, Reserved

GIB = 1 << 30


@dataclass(frozen=True)
class Demand:
    """What a recipe file asks of a server. Bytes are the most that each may have.

    artifacts: {name: (bytes, rank)} of recipes. eager: which of them are made at the start. adapters: {name: bytes}
    as they are read. served: names that a request can ask for and that take a slot. arms: {experiment: how many}.
    """

    artifacts: Mapping[str, tuple[int, int]]
    eager: Sequence[str]
    adapters: Mapping[str, int]
    served: int
    arms: Mapping[str, int]

    @property
    def largest(self) -> int:
        return max((size for size, _ in self.artifacts.values()), default=0)

    @property
    def eager_bytes(self) -> int:
        return sum(self.artifacts[name][0] for name in self.eager)


@dataclass(frozen=True)
class Fit:
    """problems: what will not work. advice: what will, but worse than it could."""

    problems: list[str]
    advice: list[str]


def fit(
    model: Decoder,
    demand: Demand,
    found: Budget,
    reserved: Reserved,
    *,
    max_loras: int,
    max_rank: int,
    max_length: int,
    parallel: Parallel,
    accepted_ranks: Sequence[int],
) -> Fit:
    """Look at what is asked and what is there."""
    problems, advice = [], []
    if max_rank not in accepted_ranks:
        problems.append(f"--max-lora-rank {max_rank} is none that vLLM takes ({', '.join(map(str, accepted_ranks))})")
    for name, (size, rank) in demand.artifacts.items():
        if rank > max_rank:
            problems.append(
                f"recipe {name} may have rank {rank}: raise --max-lora-rank to at least that, or give the recipe a `rank`"
            )
        if size > reserved.cache:
            problems.append(f"recipe {name} may take {gib(size)}: set VLLM_MERGE_CACHE_BYTES to at least {size}")
    for name, arms in demand.arms.items():
        if arms > max_loras:
            problems.append(f"experiment {name} has {arms} arms: set --max-loras to at least {arms}")
    if found.tokens is not None and found.tokens < max_length:
        problems.append(_no_room(found, max_length))
    if demand.eager_bytes > reserved.cache:
        advice.append(
            f"the eager recipes take {gib(demand.eager_bytes)} together, and those that do not fit the cache leave it "
            f"again: set VLLM_MERGE_CACHE_BYTES to {demand.eager_bytes}, or give some `load: lazy`"
        )
    sources = sum(demand.adapters.values())
    if sources > reserved.sources:
        advice.append(
            f"the adapters take {gib(sources)}, and those that do not fit host memory are read from their files for every "
            f"merge: set VLLM_MERGE_SOURCE_BYTES to {sources}"
        )
    if demand.served > max_loras:
        advice.append(
            f"the file has {demand.served} artifacts and there are {max_loras} slots: requests for more than {max_loras} of "
            f"them at once wait for each other. A slot takes {gib(found.slots // max_loras)}"
        )
    spare = reserved.cache - max(demand.eager_bytes, demand.largest)
    if found.tokens is not None and found.tokens < 4 * max_length and spare > GIB:
        advice.append(
            f"the cache is {gib(spare)} larger than the recipes need: what is taken off VLLM_MERGE_CACHE_BYTES is KV cache"
        )
    if model.experts:
        advice.append("merges for mixtures of experts are experimental, and their slots are estimated")
    if parallel.tensor > model.kv_heads:
        advice.append(f"{model.kv_heads} key-value heads on {parallel.tensor} GPUs: each is kept more than once")
    return Fit(problems, advice)


def _no_room(found: Budget, max_length: int) -> str:
    wanted = max_length * found.kv_per_token
    missing = wanted - (found.kv_cache or 0)
    options = {
        "lower VLLM_MERGE_CACHE_BYTES": found.cache,
        "lower VLLM_MERGE_WORKSPACE_BYTES": found.merges,
        "lower --max-loras or --max-lora-rank": found.slots,
    }
    cures = [f"{what} ({gib(size)} now)" for what, size in options.items() if size > missing // 20]
    return (
        f"one sequence of {max_length} tokens takes {gib(wanted)} of KV cache, and {gib(missing)} of that are missing: "
        f"{'; '.join([*cures, 'spread the model over more GPUs, or shorten --max-model-len'])}"
    )


def gib(count: int) -> str:
    """Bytes in GiB (small ones in MiB), as GPUs and vLLM count them."""
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / (1 << 20):.1f} MiB"
