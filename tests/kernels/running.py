# SPDX-License-Identifier: Apache-2.0
"""The checks of a kernel's file, run on a GPU, or in Triton's interpreter by a process of its own where there is none.

A check is a function `check_…(device)`. Triton decides when it is imported whether it interprets, hence the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def checks_of(names: Mapping[str, object]) -> list[Callable[[str], None]]:
    """All checks among a module's names."""
    return [value for name, value in names.items() if name.startswith("check_") and callable(value)]


def interpret(module: str, names: Mapping[str, object]) -> None:
    """Run a module as a program with Triton's interpreter; it must say that it has done all of its checks."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"done {check.__name__}" for check in checks_of(names)]


def both_ways(
    module: str, names: Mapping[str, object]
) -> tuple[Callable[[], None], Callable[[Callable[[str], None]], None]]:
    """The tests of a module whose checks are its `names`: all in Triton's interpreter, and each on a GPU."""

    def in_tritons_interpreter() -> None:
        interpret(module, names)

    @pytest.mark.gpu
    @on_a_gpu
    @pytest.mark.parametrize("check", checks_of(names), ids=lambda check: check.__name__)
    def on_gpu(check: Callable[[str], None]) -> None:
        check("cuda")

    return in_tritons_interpreter, on_gpu


def run_all(names: Mapping[str, object]) -> None:
    """What such a program does."""
    for check in checks_of(names):
        check("cpu")
        print("done", check.__name__)
