# SPDX-License-Identifier: Apache-2.0
"""An artifact as the files of a PEFT folder, read from a worker's cache piece by piece."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_merge.adapters.peft import CONFIG_FILE, written_config
from vllm_merge.adapters.sequence_state import REPORT_FILE
from vllm_merge.adapters.tensor_file import DTYPES, LENGTH_BYTES
from vllm_merge.adapters.tensor_names import Part, TensorName
from vllm_merge.serving.memory.packed import Packed, SideStream
from vllm_merge.serving.memory.residency import ResidentArtifact

MAX_PIECE = 1 << 18  # bytes; a larger one would make the control line's other messages wait

_SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Span:
    """Bytes that lie in one run in the file's tensor data, from `start`, and in the artifact's storage, from `source`."""

    start: int
    source: int
    size: int


@dataclass(frozen=True)
class Export:
    """What the files of an artifact hold. Nothing of the artifact's memory is referred to.

    texts: {name: content} of the small files. head: the first bytes of the weights' file; spans: the rest, in order.
    """

    texts: dict[str, str]
    head: bytes
    spans: Sequence[Span]

    @classmethod
    def of(cls, artifact: ResidentArtifact, base_model: str) -> Export:
        """The layout of safetensors (https://huggingface.co/docs/safetensors), tensors sorted by name, no holes."""
        packed = Packed.of(artifact)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        spans, at = [], 0
        for module, places in sorted(packed.places.items()):
            parts: tuple[Part, Part] = ("A", "B")
            for part, place in zip(parts, places, strict=True):
                size = place.shape[0] * place.shape[1] * packed.dtype.itemsize
                header[str(TensorName(module, part, module in packed.embeddings))] = {
                    "dtype": _SAFETENSORS_NAMES[packed.dtype],
                    "shape": place.shape,
                    "data_offsets": (at, at + size),
                }
                spans.append(Span(at, place.start, size))
                at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH_BYTES)
        ranks = {module: a.shape[0] for module, (a, _) in artifact.factors.items()}
        config = written_config(ranks, base_model)
        texts = {CONFIG_FILE: _json(config)}
        if artifact.report is not None:
            texts[REPORT_FILE] = _json(artifact.report)
        return cls(texts, len(text).to_bytes(LENGTH_BYTES, "little") + text, spans)

    @property
    def size(self) -> int:
        """Bytes of the weights' file."""
        return len(self.head) + self.spans[-1].start + self.spans[-1].size

    def read(self, artifact: ResidentArtifact, offset: int, size: int, stream: SideStream) -> bytes:
        """At most `size` bytes of the weights' file from `offset` on; artifact: the one that this was made of."""
        piece = self.head[offset : offset + size]
        storage = artifact.storage.view(torch.uint8)
        at = offset + len(piece) - len(self.head)
        index = max(0, bisect_right(self.spans, at, key=lambda span: span.start) - 1)
        views, left = [], size - len(piece)
        for span in self.spans[index:]:
            if left <= 0:
                break
            first = max(0, at - span.start)
            count = min(span.size - first, left)
            views.append(storage[span.source + first : span.source + first + count])
            left -= count
        if not views:
            return piece
        with torch.inference_mode(), stream.use():
            data = torch.cat(views).to("cpu")
        return piece + data.numpy().tobytes()


def _json(content: object) -> str:
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
