# SPDX-License-Identifier: Apache-2.0
"""The demo's model, quantised as checkpoints are found: rounded to the nearest, its linear layers alone.

Layouts: compressed-tensors `int-quantized` and `pack-quantized`, GPTQ, AWQ (`gemm`). W is (d_out, d_in); groups are of
GROUP inputs; four-bit values are packed eight to an int32, the first in its lowest bits.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _grouped(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Four bits, symmetric: values of −8 … 7 (d_out, d_in), and a scale for each group, (d_out, groups)."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(-1).clamp_min(1e-8) / 7
    return (groups / scale[..., None]).round().clamp(-8, 7).view_as(weight).to(torch.int32), scale


def _packed(values: Tensor) -> Tensor:
    """Eight columns of 0 … 15 in an int32, (rows, columns / 8)."""
    eight = values.to(torch.int64).view(values.shape[0], -1, 8) << (4 * torch.arange(8))
    words = eight.sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def int8(weight: Tensor) -> dict[str, Tensor]:
    """Eight bits and a scale for each output; the inputs are quantised token by token as they come."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def int4(weight: Tensor) -> dict[str, Tensor]:
    """Four bits, packed along the inputs."""
    values, scale = _grouped(weight)
    return {
        "weight_packed": _packed(values + 8),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """Four bits, inputs by outputs, packed along the inputs; GPTQ stores zero points less one."""
    values, scale = _grouped(weight)
    zeros = torch.full((scale.shape[1], weight.shape[0]), 7)
    return {
        "qweight": _packed(values + 8).mT.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scale.mT.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }


def awq(weight: Tensor) -> dict[str, Tensor]:
    """Four bits, inputs by outputs, packed along the outputs in AWQ's order."""
    values, scale = _grouped(weight)

    def shuffled(matrix: Tensor) -> Tensor:
        return matrix.view(matrix.shape[0], -1, 8)[..., AWQ_ORDER].reshape(matrix.shape)

    zeros = torch.full((scale.shape[1], weight.shape[0]), 8)
    return {
        "qweight": _packed(shuffled((values + 8).mT.contiguous())),
        "qzeros": _packed(shuffled(zeros)),
        "scales": scale.mT.contiguous(),
    }


def _compressed(bits: int, strategy: str, form: str, activations: dict[str, Any] | None) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": strategy, "dynamic": False}
    if strategy == "group":
        weights["group_size"] = GROUP
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


_TOKENWISE = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FORMATS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "compressed-tensors W8A8": (int8, _compressed(8, "channel", "int-quantized", _TOKENWISE)),
    "compressed-tensors W4A16": (int4, _compressed(4, "group", "pack-quantized", None)),
    "GPTQ": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}


def quantise(source: Path, target: Path, name: str) -> None:
    """Write the model `source` to `target` in one of FORMATS."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    form, settings = FORMATS[name]
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            tensors |= {f"{key.removesuffix('weight')}{part}": t for part, t in form(tensor.float()).items()}
        else:
            tensors[key] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}), encoding="utf-8")
