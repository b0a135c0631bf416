# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters in memory: the factors of one module and the named collection of all modules."""

from __future__ import annotations

import hashlib
import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from vllm_merge.errors import UserInputError

if TYPE_CHECKING:
    from vllm_merge.adapters.places import Places


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """The weight change of one module, ΔW = scaling · B @ A.

    A: (r, d_in), B: (d_out, r), any floating dtype, on any one device. scaling: alpha / r, or alpha / √r for rsLoRA.
    embedding: the module is an embedding, a linear map of one-hot tokens: d_in tokens, d_out features. ΔW then is the
    transpose of what PEFT adds to the embedding's weight, which has a row for each token.
    Raises UserInputError when the shapes do not fit together or the scaling is not finite.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    embedding: bool = False

    def __post_init__(self) -> None:
        a, b = self.A.shape, self.B.shape
        if len(a) != 2 or len(b) != 2:
            self._refuse("must be matrices, A (r, d_in) and B (d_out, r)")
        if a[0] != b[1]:
            self._refuse("A (r, d_in) and B (d_out, r) must have the same rank r")
        if 0 in a or 0 in b:
            self._refuse("must not be empty")
        if not (self.A.is_floating_point() and self.B.is_floating_point()):
            self._refuse("must be floating point")
        if not math.isfinite(self.scaling):
            raise UserInputError(f"LoRA scaling must be finite; found {self.scaling}")

    def _refuse(self, why: str) -> NoReturn:
        found = f"found A {tuple(self.A.shape)} {self.A.dtype}, B {tuple(self.B.shape)} {self.B.dtype}"
        raise UserInputError(f"LoRA factors {why}; {found}")

    @property
    def rank(self) -> int:
        """Number of rank-one terms, r."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def delta(self) -> Tensor:
        """ΔW as a dense (d_out, d_in) float32 matrix."""
        return self.scaling * (self.B.float() @ self.A.float())

    def folded(self) -> LoraFactors:
        """The same ΔW with the scaling multiplied into B, in the dtype of B."""
        if self.scaling == 1.0:
            return self
        return LoraFactors(self.A, self.B * self.scaling, 1.0, self.embedding)


@lru_cache(maxsize=1 << 16)
def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts `layers.2` before `layers.10`."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The tensor's elements in row-major order."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def tensor_header(tensor: Tensor) -> bytes:
    """What is hashed of a tensor before its bytes."""
    return f"{tuple(tensor.shape)}\0{tensor.dtype}\0".encode()


def factors_sha256(factors: Mapping[str, LoraFactors]) -> str:
    """SHA-256 (hex) of names, shapes, dtypes, scalings and bytes, in natural module order."""
    digest = hashlib.sha256()
    for name in sorted(factors, key=natural_key):
        module = factors[name]
        digest.update(f"{name}\0{module.scaling!r}\0".encode())
        for tensor in (module.A, module.B):
            digest.update(tensor_header(tensor))
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


class Layout(tuple[tuple[str, tuple[int, int], int, bool], ...]):
    """(module, (d_out, d_in), rank, whether it is an embedding) of every module of an adapter. Its hash is kept."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class LazyFactors(Mapping[str, LoraFactors]):
    """Factors by module, in natural order, that are made when they are asked for."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """What is known of all of them before they are made."""


@dataclass(slots=True)
class Found:
    """What was found out about the content of an adapter, which all its names share.

    zero: whether ΔW = 0 at every module, once a merge has found out.
    """

    places: Places | None = None
    content_hash: str | None = None
    zero: bool | None = None


class Adapter:
    """A named LoRA adapter in memory: module name → LoraFactors, in natural module order.

    Module names are those of the base model, e.g. `model.layers.0.self_attn.q_proj`. An absent module has ΔW = 0.
    """

    def __init__(
        self,
        name: str,
        factors: Mapping[str, LoraFactors],
        *,
        content_hash: str | None = None,
        base_model: str | None = None,
        metadata: Mapping[str, object] | None = None,
    ) -> None:
        self.name = name
        self.factors: Mapping[str, LoraFactors] = factors
        if isinstance(factors, LazyFactors):
            self.layout = factors.layout
        else:
            ordered = {module: factors[module] for module in sorted(factors, key=natural_key)}
            self.factors = MappingProxyType(ordered)
            self.layout = Layout((m, pair.shape, pair.rank, pair.embedding) for m, pair in ordered.items())
        self.base_model = base_model
        self.metadata: Mapping[str, object] = MappingProxyType(dict(metadata or {}))
        self.known_hash = content_hash
        """The content hash that was given, if one was."""
        self.found = Found()

    @property
    def places(self) -> Places:
        """Where the factors lie in memory."""
        if self.found.places is None:
            from vllm_merge.adapters.places import Places

            self.found.places = Places.of(self.factors)
        return self.found.places

    @property
    def content_hash(self) -> str:
        """SHA-256 (hex) that identifies the adapter's content; computed from the factors unless it was given."""
        if self.known_hash is not None:
            return self.known_hash
        if self.found.content_hash is None:
            self.found.content_hash = factors_sha256(self.factors)
        return self.found.content_hash

    @property
    def rank(self) -> int:
        """Largest rank over the modules (0 without modules)."""
        return max((module.rank for module in self.factors.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(module.nbytes for module in self.factors.values())

    @classmethod
    def from_peft(
        cls, path: str | Path, name: str | None = None, *, device: str | torch.device | None = None
    ) -> Adapter:
        """Read a PEFT folder (safetensors) to a device (default: the CPU). The name defaults to the folder's name."""
        from vllm_merge.adapters.peft import read_adapter

        return read_adapter(Path(path), name, device=device)

    def named(self, name: str) -> Adapter:
        """The same adapter under another name; what is found out about one is known of the other."""
        renamed = copy(self)
        renamed.name = name
        return renamed

    def __repr__(self) -> str:
        return f"Adapter({self.name!r}, {len(self.factors)} modules, rank {self.rank})"


def embeddings_of(adapters: Sequence[Adapter]) -> frozenset[str]:
    """The modules that are embeddings. Raises UserInputError where one adapter says so of a module and another does not."""
    return _embeddings(tuple(adapter.layout for adapter in adapters), tuple(adapter.name for adapter in adapters))


@lru_cache(maxsize=16)
def _embeddings(layouts: tuple[Layout, ...], names: tuple[str, ...]) -> frozenset[str]:
    says: dict[str, tuple[str, bool]] = {}
    for name, layout in zip(names, layouts, strict=True):
        for module, _, _, embedding in layout:
            first, before = says.setdefault(module, (name, embedding))
            if embedding != before:
                one, other = (first, name) if before else (name, first)
                raise UserInputError(
                    f"module {module!r} is an embedding in adapter {one!r} and a linear layer in {other!r}; adapters to "
                    "be merged must be of the same base model"
                )
    return frozenset(module for module, (_, embedding) in says.items() if embedding)
