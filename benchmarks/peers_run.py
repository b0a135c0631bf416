# SPDX-License-Identifier: Apache-2.0
"""The same merge by the others: PEFT in this process, mergekit by its command. Both give ΔW by module, in float32."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

Deltas = dict[str, Tensor]


class Peft:
    """A base model with adapters in PEFT, for calls of add_weighted_adapter."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        (first, folder), *others = adapters.items()
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._model: Any = PeftModel.from_pretrained(model, folder, adapter_name=first)
        for name, folder in others:
            self._model.load_adapter(folder, adapter_name=name)

    def merged(self, call: Mapping[str, Any], seed: int) -> Deltas:
        """ΔW of the modules that the call's result has. call: the arguments, with adapter_name."""
        torch.manual_seed(seed)
        name = call["adapter_name"]
        with torch.no_grad():
            self._model.add_weighted_adapter(**call)
            found = {
                path.removeprefix("base_model.model."): module.get_delta_weight(name).clone()
                for path, module in self._model.named_modules()
                if name in getattr(module, "lora_A", {})
            }
        self._model.delete_adapter(name)
        return found


class Mergekit:
    """mergekit's command for several merges of whole models; the base is taken off their results again."""

    def __init__(self, command: str, base: Path) -> None:
        self._command = command
        self._base = {name: value.float() for name, value in load_file(base / "model.safetensors").items()}

    @classmethod
    def found(cls, command: str, base: Path) -> Mergekit | None:
        """None where there is no such command."""
        path = shutil.which(command)
        return None if path is None else cls(path, base)

    @property
    def version(self) -> str:
        """Of the package that the command belongs to, as its own interpreter knows it."""
        interpreter = Path(self._command).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#!")
        code = "from importlib.metadata import version; print(version('mergekit'))"
        found = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    def merged(
        self, configs: Mapping[str, Mapping[str, Any]], seed: int, lora_dtype: str | None = "float32"
    ) -> dict[str, Deltas]:
        """{name: ΔW by module} of configurations by name. Raises RuntimeError with the end of what a failed run printed.

        lora_dtype: in which adapters are put into the base; None for the base's own, as mergekit does it by default.
        """
        # Their names must be no word of a configuration: mergekit would take `linear` for the model of that name.
        documents = [{**config, "name": f"result-of-{name}"} for name, config in configs.items()]
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            (folder / "merges.yaml").write_text(yaml.safe_dump_all(documents, sort_keys=False), encoding="utf-8")
            options = ["--intermediate-dir", str(folder / "out"), "--lora-merge-cache", str(folder / "cache")]
            options += ["--random-seed", str(seed), "--no-copy-tokenizer"]
            options += [] if lora_dtype is None else ["--lora-merge-dtype", lora_dtype]
            arguments = [str(folder / "merges.yaml"), *options]
            run = subprocess.run([self._command, *arguments], capture_output=True, text=True, check=False)
            if run.returncode != 0:
                raise RuntimeError(f"{self._command} ended with {run.returncode}:\n{run.stderr[-2000:]}")
            return {name: self._delta(folder / "out" / f"result-of-{name}") for name in configs}

    def _delta(self, folder: Path) -> Deltas:
        changed: Deltas = {}
        for file in folder.glob("*.safetensors"):
            for name, value in load_file(file).items():
                difference = value.float() - self._base[name]
                if value.ndim == 2 and bool(difference.any()):
                    changed[name.removesuffix(".weight")] = difference
        return changed
