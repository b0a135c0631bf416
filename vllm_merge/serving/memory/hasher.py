# SPDX-License-Identifier: Apache-2.0
"""The SHA-256 of an artifact's tensors, taken while it is served already."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vllm_merge.adapters.factors import natural_key, tensor_header
from vllm_merge.serving.memory.packed import PIECE_BYTES, SideStream
from vllm_merge.serving.memory.residency import ResidentArtifact


class Hasher:
    """For one thread of one worker. What lies on a GPU passes through memory that was pinned at the start."""

    def __init__(self, device: torch.device) -> None:
        self._stream = SideStream(device)
        self._chunk = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def tensors_sha256(self, artifact: ResidentArtifact) -> str:
        """What `MergedAdapter.tensors_sha256` gives for the artifact's factors."""
        digest = hashlib.sha256()
        for module in sorted(artifact.factors, key=natural_key):
            digest.update(f"{module}\0{1.0!r}\0".encode())
            for tensor in artifact.factors[module]:
                digest.update(tensor_header(tensor))
                self._update(digest, tensor.view(-1).view(torch.uint8))
        return digest.hexdigest()

    def _update(self, digest: hashlib._Hash, data: Tensor) -> None:
        for start in range(0, data.numel(), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            here = self._chunk[: piece.numel()]
            with self._stream.use():
                here.copy_(piece, non_blocking=True)
            digest.update(here.numpy().data)
