# SPDX-License-Identifier: Apache-2.0
"""An artifact outside of the cache: one run of bytes, and where each factor lies in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.serving.memory.residency import ResidentArtifact

PIECE_BYTES = 4 << 20  # copied at once; a GPU copies in turn, and the tokens of a step would wait for a whole artifact


class SideStream:
    """`with stream.use(): …` copies on a stream of its own, so that no step waits for them; done when the block ends."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextmanager
    def use(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._stream.synchronize()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy (bytes,) uint8 piece by piece: small copies of others go in between."""
        for mine, its in zip(torch.split(target, PIECE_BYTES), torch.split(source, PIECE_BYTES), strict=True):
            with self.use():
                mine.copy_(its, non_blocking=True)


@dataclass(frozen=True)
class Place:
    """Where a factor lies: its first byte, and its shape."""

    start: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Packed:
    """data: (bytes,) uint8 on any device. places: {module: (of A, of B)}. The rest is the artifact's."""

    digest: str
    name: str
    dtype: torch.dtype
    places: Mapping[str, tuple[Place, Place]]
    data: Tensor
    tensors_sha256: str | None
    seconds: float
    embeddings: frozenset[str] = frozenset()
    report: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, artifact: ResidentArtifact) -> Packed:
        """A view of an artifact, nothing is copied."""
        data = artifact.storage.view(torch.uint8)
        first = artifact.storage.data_ptr()
        places = {
            module: (
                Place(a.data_ptr() - first, (a.shape[0], a.shape[1])),
                Place(b.data_ptr() - first, (b.shape[0], b.shape[1])),
            )
            for module, (a, b) in artifact.factors.items()
        }
        return cls(
            artifact.digest,
            artifact.name,
            artifact.storage.dtype,
            places,
            data,
            artifact.tensors_sha256,
            artifact.seconds,
            artifact.embeddings,
            artifact.report,
        )

    def at(self, data: Tensor) -> Packed:
        """The same artifact in other bytes, which hold what these hold."""
        return replace(self, data=data)

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """{module: (A, B)} as views of the bytes."""
        return {module: (self._view(a), self._view(b)) for module, (a, b) in self.places.items()}

    def lora_factors(self) -> dict[str, LoraFactors]:
        """The same as an adapter has it, to be written as a PEFT folder."""
        return {m: LoraFactors(a, b, embedding=m in self.embeddings) for m, (a, b) in self.factors().items()}

    def _view(self, place: Place) -> Tensor:
        rows, columns = place.shape
        stop = place.start + rows * columns * self.dtype.itemsize
        return self.data[place.start : stop].view(self.dtype).view(rows, columns)
