# SPDX-License-Identifier: Apache-2.0
"""PEFT's names for the tensors of a LoRA adapter.

    base_model.model.<module>.lora_A.weight            A (r, d_in) of a linear layer, and lora_B (d_out, r)
    base_model.model.<module>.lora_embedding_A         A (r, tokens) of an embedding, and lora_embedding_B (features, r)

PEFT puts an adapter's name in before `.weight`, or at the end, while a model is in memory; some files have it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vllm_merge.adapters.words import shown
from vllm_merge.errors import UserInputError

Part = Literal["A", "B"]

MAX_NAME = 512  # characters of a module's name
PREFIX = "base_model.model."
# PEFT saves the weight itself beside the factors where an embedding or the language model's head is a target.
BASE_COPY = ".base_layer.weight"
FULL_WEIGHT_HINT = "only LoRA factors can be merged: save the adapter with save_embedding_layers=False"

_UNSUPPORTED_PARTS = {
    "lora_magnitude_vector": "a DoRA magnitude, which is not a low-rank update",
    "modules_to_save": "a whole module saved beside the LoRA factors",
}


@dataclass(frozen=True, slots=True)
class TensorName:
    """What a tensor's name says: whose factor it is, which, and whether the module is an embedding."""

    module: str
    part: Part
    embedding: bool = False

    def __str__(self) -> str:
        if self.embedding:
            return f"{PREFIX}{self.module}.lora_embedding_{self.part}"
        return f"{PREFIX}{self.module}.lora_{self.part}.weight"

    @property
    def kind(self) -> str:
        """`lora_A` or `lora_B`, `lora_embedding_A` or `lora_embedding_B`."""
        return f"lora_embedding_{self.part}" if self.embedding else f"lora_{self.part}"


def parse_name(key: str, where: Path) -> TensorName:
    """What the tensor `key` of the file `where` is. Raises UserInputError for one that is no factor of a plain LoRA."""
    for part, meaning in _UNSUPPORTED_PARTS.items():
        if part in key.split("."):
            raise UserInputError(f"{where}: tensor {shown(key)} is {meaning}; only plain LoRA adapters can be merged")
    name = _linear(key) or _embedding(key)
    if name is not None:
        if not (0 < len(name.module) <= MAX_NAME and name.module.isprintable()):
            raise UserInputError(
                f"{where}: tensor {shown(key)} is of no module; a name has 1 to {MAX_NAME} printable characters"
            )
        return name
    if key.endswith((".embed_tokens.weight", ".lm_head.weight")):
        raise UserInputError(f"{where}: tensor {shown(key)} is a whole weight; {FULL_WEIGHT_HINT}")
    raise UserInputError(
        f"{where}: tensor {shown(key)} is not part of a LoRA adapter; expected names are "
        f"{PREFIX}<module>.lora_A.weight and {PREFIX}<module>.lora_B.weight, of an embedding lora_embedding_A and "
        "lora_embedding_B"
    )


def _linear(key: str) -> TensorName | None:
    parts: tuple[Part, Part] = ("A", "B")
    for part in parts:
        module, found, rest = key.rpartition(f".lora_{part}.")
        if found and module.startswith(PREFIX) and (rest == "weight" or rest.endswith(".weight")):
            return TensorName(module.removeprefix(PREFIX), part)
    return None


def _embedding(key: str) -> TensorName | None:
    parts: tuple[Part, Part] = ("A", "B")
    for part in parts:
        module, found, _ = f"{key}.".rpartition(f".lora_embedding_{part}.")
        if found and module.startswith(PREFIX):
            return TensorName(module.removeprefix(PREFIX), part, embedding=True)
    return None
