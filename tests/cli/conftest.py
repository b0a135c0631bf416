# SPDX-License-Identifier: Apache-2.0
"""A recipe with two small adapters, and a way to run commands in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_merge import LoraFactors
from vllm_merge.adapters.peft import write_adapter
from vllm_merge.cli.app import main

Run = Callable[..., tuple[int, str, str]]

RECIPE = """\
version: 1
base_model: org/base
adapters: {a: {path: ./a}, b: {path: ./b}}
recipes:
  sum: {merge_method: task_arithmetic, adapters: [{adapter: a, parameters: {weight: 0.5}}, {adapter: b}]}
aliases: {best: sum}
"""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: (exit code, stdout, stderr)."""

    def execute(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(exited.value.code or 0), out, err

    return execute


def factors(seed: int, rank: int) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.{layer}.q_proj": LoraFactors(
            torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        )
        for layer in range(2)
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", factors(1, 2), base_model="org/base")
    write_adapter(tmp_path / "b", factors(2, 1), base_model="org/base")
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path / "r.yaml"
