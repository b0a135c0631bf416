# SPDX-License-Identifier: Apache-2.0
"""Whether adapters fit a base model, from the headers of its weight files alone."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_merge.adapters.tensor_file import read_matrices
from vllm_merge.errors import UserInputError

MAX_CONFIG_BYTES = 4 * 2**20
_HEAD = "lm_head"


@dataclass(frozen=True)
class BaseShapes:
    """What a model folder says of its weights. matrices: weight name -> (d_out, d_in); vocabulary: tokens, if told; tied:
    whether the head's weight is the token embedding's."""

    folder: Path
    matrices: Mapping[str, tuple[int, int]]
    vocabulary: int | None
    tied: bool = False


def read_base_shapes(folder: Path) -> BaseShapes:
    """Read the headers of the folder's safetensors files and its config.json. Raises UserInputError for damaged ones."""
    try:
        matrices: dict[str, tuple[int, int]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            matrices.update(read_matrices(file))
        config = _config(folder / "config.json")
        size, tied = config.get("vocab_size"), config.get("tie_word_embeddings") is True
        return BaseShapes(folder, matrices, size if isinstance(size, int) else None, tied)
    except OSError as error:
        raise UserInputError(f"{error.filename}: cannot be read: {error.strerror}") from None


def misfit(
    base: BaseShapes, modules: Mapping[str, tuple[int, int, int]], embeddings: Collection[str] = ()
) -> str | None:
    """Why an adapter with these modules {name: (d_out, d_in, rank)} cannot be of this base model; None if it may be.

    embeddings: which of the modules are embeddings, (features, tokens, rank).
    Only what is certain counts: a module whose weight is a plain matrix of another shape in both orientations (some
    models keep it transposed), an embedding of other tokens or features, or a head over another vocabulary. Renamed and
    quantised weights are not judged.
    """
    for module, (d_out, d_in, _) in modules.items():
        shape = base.matrices.get(f"{module}.weight")
        if module in embeddings:
            if shape is not None and (d_in, d_out) != shape:
                return (
                    f"{module} embeds {d_in:,} tokens in {d_out:,} features and that of {base.folder} {shape[0]:,} in "
                    f"{shape[1]:,}; the adapter was trained on a model with another vocabulary or width"
                )
        elif module == _HEAD or module.endswith(f".{_HEAD}"):
            if base.vocabulary is not None and d_out != base.vocabulary:
                return (
                    f"{module} has {d_out:,} tokens and the vocabulary of {base.folder} has {base.vocabulary:,}; "
                    "the adapter was trained on a model with another vocabulary"
                )
        elif shape is not None and (d_out, d_in) not in (shape, shape[::-1]):
            return (
                f"{module} maps {d_in} to {d_out} features and that of {base.folder} maps {shape[1]} to {shape[0]}; "
                "the adapter was trained on another base model"
            )
    return None


def unknown_modules(base: BaseShapes, modules: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """The modules whose weights the base model does not have under that name."""
    known = {name.removesuffix(".weight") for name in base.matrices} | {_HEAD}
    return [module for module in modules if module not in known] if base.matrices else []


def tied_weight(base: BaseShapes, modules: Collection[str], embeddings: Collection[str]) -> str | None:
    """What to know of an adapter that changes one of the two modules with one weight, embedding and head; None for others.

    PEFT's `ensure_weight_tying` trains one change of both and saves it for both; such an adapter needs no word.
    """
    heads = [module for module in modules if module.rpartition(".")[2] == _HEAD]
    if not base.tied or bool(heads) == bool(embeddings):
        return None
    changed, other = (min(embeddings), "the head") if embeddings else (heads[0], "the token embedding")
    return (
        f"{changed} shares its weight with {other} of {base.folder}, and the adapter changes {changed} alone. So does what "
        f"is served, as PEFT does; merged into the model's weights it would change {other} too"
    )


def _config(config: Path) -> dict[str, object]:
    if not config.is_file():
        return {}
    with config.open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES)
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserInputError(f"{config}: not valid JSON ({error}); the base model's folder is damaged") from None
    return fields if isinstance(fields, dict) else {}
