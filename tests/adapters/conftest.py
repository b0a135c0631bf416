# SPDX-License-Identifier: Apache-2.0
"""Small PEFT folders, and raw safetensors files, right or wrong on purpose."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

MakeFolder = Callable[..., Path]

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def pair(
    module: str = Q, rank: int = 4, d_in: int = 6, d_out: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, d_in, generator=generator).to(dtype),
        f"{module}.lora_B.weight": torch.randn(d_out, rank, generator=generator).to(dtype),
    }


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """Write a PEFT folder called sql; `config` changes fields, `tensors` or `raw` replace the weights."""

    def make(
        config: Mapping[str, Any] | bytes | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        raw: bytes | None = None,
    ) -> Path:
        path = tmp_path / "sql"
        path.mkdir(exist_ok=True)
        if isinstance(config, bytes):
            (path / "adapter_config.json").write_bytes(config)
        else:
            (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
        if raw is not None:
            (path / "adapter_model.safetensors").write_bytes(raw)
        else:
            save_file(dict(pair() if tensors is None else tensors), path / "adapter_model.safetensors")
        return path

    return make


@pytest.fixture
def make_pair() -> Callable[..., dict[str, torch.Tensor]]:
    return pair


@pytest.fixture
def raw_file() -> Callable[[Any, bytes], bytes]:
    """The bytes of a safetensors file with this header (text, or data for JSON) and these tensor bytes."""

    def make(header: Any, data: bytes) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    return make
