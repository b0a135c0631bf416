# SPDX-License-Identifier: Apache-2.0
"""Whether adapters fit a base model: only what is certain is refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_merge.adapters.base_fit import misfit, read_base_shapes, tied_weight, unknown_modules
from vllm_merge.errors import UserInputError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"vocab_size": 9}')
    weights = {"q.weight": torch.zeros(5, 6), "conv.weight": torch.zeros(6, 5), "norm.weight": torch.zeros(6)}
    packed = {"packed.weight": torch.zeros(30, 1, dtype=torch.uint8), "q.qweight": torch.zeros(2, 2, dtype=torch.int32)}
    save_file(weights, tmp_path / "model-1.safetensors")
    save_file(packed | {"v.weight": torch.zeros(4, 6, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    return tmp_path


OTHER_BASE = "; the adapter was trained on another base model"
CASES = {
    "fits": ({"q": (5, 6, 2), "v": (4, 6, 1)}, None),
    "kept transposed": ({"conv": (5, 6, 2)}, None),
    "quantised": ({"packed": (5, 6, 2)}, None),
    "not known": ({"elsewhere": (7, 7, 2)}, None),
    "head": ({"lm_head": (9, 6, 2)}, None),
    "other features": (
        {"q": (5, 6, 2), "v": (4, 8, 1)},
        "v maps 8 to 4 features and that of BASE maps 6 to 4" + OTHER_BASE,
    ),
    "other vocabulary": (
        {"model.lm_head": (11, 6, 2)},
        "model.lm_head has 11 tokens and the vocabulary of BASE has 9; the adapter was trained on a model with another "
        "vocabulary",
    ),
}


EMBEDDINGS = {
    "fits": ({"embed": (6, 9, 2)}, None),
    "not known": ({"elsewhere": (6, 11, 2)}, None),
    "other vocabulary": (
        {"embed": (6, 11, 2)},
        "embed embeds 11 tokens in 6 features and that of BASE 9 in 6; the adapter was trained on a model with another "
        "vocabulary or width",
    ),
    "transposed": (
        {"embed": (9, 6, 2)},
        "embed embeds 6 tokens in 9 features and that of BASE 9 in 6; the adapter was trained on a model with another "
        "vocabulary or width",
    ),
}


@pytest.mark.parametrize("case", EMBEDDINGS)
def test_misfit_of_an_embedding(case: str, base: Path) -> None:
    modules, message = EMBEDDINGS[case]
    save_file({"embed.weight": torch.zeros(9, 6)}, base / "model-3.safetensors")
    found = misfit(read_base_shapes(base), modules, embeddings=frozenset(modules))
    assert (found and found.replace(str(base), "BASE")) == message


@pytest.mark.parametrize(
    ("tied", "modules", "embeddings", "told"),
    [
        (True, ("embed", "q"), ("embed",), True),
        (True, ("embed", "lm_head"), ("embed",), False),  # PEFT's ensure_weight_tying saves both
        (True, ("q",), (), False),
        (True, ("q", "lm_head"), (), True),
        (False, ("embed",), ("embed",), False),
    ],
)
def test_a_tied_weight_is_told_of(
    tied: bool, modules: tuple[str, ...], embeddings: tuple[str, ...], told: bool, base: Path
) -> None:
    (base / "config.json").write_text(json.dumps({"vocab_size": 9, "tie_word_embeddings": tied}))
    word = tied_weight(read_base_shapes(base), modules, embeddings)
    assert (word is not None) == told
    alone, other = ("embed", "the head") if embeddings else ("lm_head", "the token embedding")
    assert word is None or word == (
        f"{alone} shares its weight with {other} of {base}, and the adapter changes {alone} alone. So does what is served, "
        f"as PEFT does; merged into the model's weights it would change {other} too"
    )


@pytest.mark.parametrize("case", CASES)
def test_misfit(case: str, base: Path) -> None:
    modules, message = CASES[case]
    found = misfit(read_base_shapes(base), modules)
    assert (found and found.replace(str(base), "BASE")) == message


def test_unknown_modules(base: Path) -> None:
    shapes = read_base_shapes(base)
    assert unknown_modules(shapes, {"q": (5, 6, 2), "elsewhere": (7, 7, 2), "lm_head": (9, 6, 1)}) == ["elsewhere"]


def test_damaged_models(base: Path) -> None:
    (base / "config.json").write_text("{")
    with pytest.raises(
        UserInputError, match=r"config.json: not valid JSON \(.*\); the base model's folder is damaged$"
    ):
        read_base_shapes(base)
    (base / "model-2.safetensors").write_bytes(struct.pack("<Q", 99) + b"{}")
    with pytest.raises(UserInputError, match=r"model-2.safetensors: the header claims 99 bytes and the file has 10"):
        read_base_shapes(base)
