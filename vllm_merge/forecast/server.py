# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server with LoRA slots takes of a GPU's memory, from the base model's config.json.

Shapes are those of decoders with grouped-query attention and gated MLPs (Llama, Qwen, Mistral, Gemma, Phi, …) and of their
mixtures of experts. LoRA slots are vLLM's: for every layer that takes LoRA, one A of (rank, d_in) and one B of (d_out, rank) per
slot; tensor parallelism splits B of column-parallel layers and A of row-parallel ones, and nothing of embedding and head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.recipe.dtypes import BYTES, Dtype

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 4 << 20
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Parallel:
    """GPUs of one engine: tensor × pipeline."""

    tensor: int = 1
    pipeline: int = 1


@dataclass(frozen=True)
class Decoder:
    """experts: 0 where the MLPs are dense; then `intermediate` is theirs, else the experts'. weight_bytes: of the files."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    experts: int
    tied: bool
    dtype: Dtype
    max_length: int
    weight_bytes: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Decoder:
        """From a model's folder, or from a config.json alone. Raises UserInputError."""
        path = folder / CONFIG_FILE if folder.is_dir() else folder
        try:
            with path.open("rb") as file:
                config = json.loads(file.read(MAX_CONFIG_BYTES))
        except OSError as error:
            raise UserInputError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UserInputError(f"{path}: not valid JSON ({error})") from None
        if not isinstance(config, dict):
            raise UserInputError(f"{path}: expected an object")
        files = [file.stat().st_size for file in folder.glob("*.safetensors")] if folder.is_dir() else []
        return cls.from_config(config, path, sum(files) or None)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: Path, weight_bytes: int | None = None) -> Decoder:
        """config: the content of config.json; of a model of several parts, its `text_config` counts."""
        text = {**config, **config["text_config"]} if isinstance(config.get("text_config"), dict) else config

        def number(*keys: str, default: int | None = None) -> int:
            for key in keys:
                value = text.get(key)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
            if default is None:
                raise UserInputError(
                    f"{path}: has no {keys[0]}; memory can be foretold for decoders with such a config.json only"
                )
            return default

        hidden, heads = number("hidden_size"), number("num_attention_heads")
        experts = number(*_EXPERTS, default=0)
        wide = number("intermediate_size", "moe_intermediate_size")
        dtype: Dtype = "bfloat16"
        if (said := text.get("dtype") or text.get("torch_dtype")) in BYTES:
            dtype = said
        return cls(
            layers=number("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=number("num_key_value_heads", default=heads),
            head_dim=number("head_dim", default=hidden // heads),
            intermediate=number("moe_intermediate_size", default=wide) if experts else wide,
            vocabulary=number("vocab_size"),
            experts=experts,
            tied=text.get("tie_word_embeddings") is True,
            dtype=dtype,
            max_length=number("max_position_embeddings", default=4096),
            weight_bytes=weight_bytes,
        )

    def _linears(self, tensor: int) -> Iterator[tuple[int, int, int, int]]:
        """(d_out, d_in, rows of B here, columns of A here) of the linear layers of one decoder layer."""
        kv = self.kv_heads * self.head_dim
        kv_here = max(1, self.kv_heads // tensor) * self.head_dim  # fewer heads than GPUs are repeated
        query = self.heads * self.head_dim
        yield query, self.hidden, query // tensor, self.hidden
        yield from ((kv, self.hidden, kv_here, self.hidden),) * 2
        yield self.hidden, query, self.hidden, query // tensor
        for _ in range(max(1, self.experts)):
            wide = self.intermediate
            yield from ((wide, self.hidden, wide // tensor, self.hidden),) * 2
            yield self.hidden, wide, self.hidden, wide // tensor

    def weights(self, parallel: Parallel) -> int:
        """Bytes of weights on one GPU: of the weight files, where there are any, else of the shapes."""
        total = self.weight_bytes
        if total is None:
            layer = sum(d_out * d_in for d_out, d_in, *_ in self._linears(1))
            ends = (1 if self.tied else 2) * self.vocabulary * self.hidden
            total = (self.layers * layer + ends) * BYTES[self.dtype]
        return math.ceil(total / (parallel.tensor * parallel.pipeline))

    def slots(self, max_loras: int, rank: int, dtype: str, parallel: Parallel) -> int:
        """Bytes of all LoRA slots on one GPU; of a pipeline, on the one that has embedding and head, at most."""
        layer = sum(rows + columns for _, _, rows, columns in self._linears(parallel.tensor))
        ends = 2 * (self.vocabulary + self.hidden)
        return max_loras * rank * (self._layers_here(parallel) * layer + ends) * BYTES[dtype]

    def kv_per_token(self, dtype: str, parallel: Parallel) -> int:
        """Bytes of keys and values of one token on one GPU."""
        heads = max(1, self.kv_heads // parallel.tensor)
        return 2 * self._layers_here(parallel) * heads * self.head_dim * BYTES[dtype]

    def _layers_here(self, parallel: Parallel) -> int:
        return math.ceil(self.layers / parallel.pipeline)


@dataclass(frozen=True)
class Reserved:
    """Bytes that a worker of ours takes: as `WorkerSettings` says, which the worker itself reads."""

    cache: int
    merges: int
    host: int
    sources: int


@dataclass(frozen=True)
class Gpu:
    """memory: bytes of the whole GPU. utilization: the share that vLLM may use. other: bytes for what vLLM itself needs
    beside weights, slots and KV cache (activations, graphs), which it measures when it starts.
    """

    memory: int
    utilization: float
    other: int

    @property
    def usable(self) -> int:
        return int(self.memory * self.utilization)


@dataclass(frozen=True)
class Budget:
    """Bytes on one GPU, and how long the sequences are that the rest of it holds. kv_cache may be negative."""

    weights: int
    slots: int
    cache: int
    merges: int
    other: int
    kv_cache: int | None
    kv_per_token: int

    @property
    def taken(self) -> int:
        return self.weights + self.slots + self.cache + self.merges + self.other

    @property
    def tokens(self) -> int | None:
        """Of all sequences together."""
        return None if self.kv_cache is None else max(0, self.kv_cache) // self.kv_per_token


def budget(
    model: Decoder, max_loras: int, rank: int, dtype: str, parallel: Parallel, reserved: Reserved, gpu: Gpu | None
) -> Budget:
    """What everything takes on one GPU; without a GPU, what is left for the KV cache is not known."""
    found = Budget(
        weights=model.weights(parallel),
        slots=model.slots(max_loras, rank, dtype, parallel),
        cache=reserved.cache,
        merges=reserved.merges,
        other=gpu.other if gpu is not None else 0,
        kv_cache=None,
        kv_per_token=model.kv_per_token(dtype, parallel),
    )
    if gpu is None:
        return found
    return Budget(**{**found.__dict__, "kv_cache": gpu.usable - found.taken})
