# SPDX-License-Identifier: Apache-2.0
"""Every adapter that is refused: the exact message."""

import errno
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_merge.adapters.peft import read_adapter, read_shapes
from vllm_merge.errors import UserInputError

MakeFolder = Callable[..., Path]
MODULE = "model.layers.0.self_attn.q_proj"
Q = f"base_model.model.{MODULE}"


def refusal(path: Path) -> str:
    """The message, with the folder's path as FOLDER."""
    with pytest.raises(UserInputError) as caught:
        read_adapter(path)
    return str(caught.value).replace(str(path), "FOLDER")


CONFIG = "adapter 'sql': FOLDER/adapter_config.json: "
WEIGHTS = "adapter 'sql': FOLDER/adapter_model.safetensors: "

ALPHA = "an alpha is a finite number other than 0, which would switch the adapter off"
WRONG_CONFIGS: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    "not an object": (b"[]", "expected a JSON object, found list"),
    "too large": (b" " * (4 * 2**20 + 1), "an adapter_config.json has at most 4,194,304 bytes; this is none"),
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only 'LORA' adapters can be merged"),
    "no kind": ({"peft_type": None}, "peft_type is None; only 'LORA' adapters can be merged"),
    "DoRA": (
        {"use_dora": True},
        "use_dora is set: DoRA rescales the merged weight, which is not a sum of low-rank updates; "
        "train or convert the adapter without it",
    ),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        "modules_to_save is set: whole modules are saved beside the LoRA factors; a merge of factors would lose them; "
        "train or convert the adapter without it",
    ),
    "experts": (
        {"target_parameters": ["experts.up"]},
        "target_parameters is set: LoRA on parameters (experts) is not supported; train or convert the "
        "adapter without it",
    ),
    "LoRA bias": (
        {"lora_bias": True},
        "lora_bias is set: the LoRA layers have a bias; train or convert the adapter without it",
    ),
    "bias": (
        {"bias": "lora_only"},
        "bias is 'lora_only'; only 'none' is allowed, because trained biases are not part of a LoRA merge",
    ),
    "PiSSA": (
        {"init_lora_weights": "pissa_niter_16"},
        "init_lora_weights is 'pissa_niter_16', which changes the base weights; save the adapter again with PEFT's "
        "path_initial_model_for_weight_conversion, which turns it into an ordinary LoRA",
    ),
    "rank 0": ({"r": 0}, "r is 0; a rank is a whole number from 1 to 65,536"),
    "rank is text": ({"r": "4"}, "r is '4'; a rank is a whole number from 1 to 65,536"),
    "rank_pattern": (
        {"rank_pattern": {"q": 1.5}},
        "rank_pattern['q'] is 1.5; a rank is a whole number from 1 to 65,536",
    ),
    "alpha": ({"lora_alpha": None}, f"lora_alpha is None; {ALPHA}"),
    "alpha 0": ({"lora_alpha": 0}, f"lora_alpha is 0; {ALPHA}"),
    "alpha 0 of a pattern": ({"alpha_pattern": {"q_proj": 0.0}}, f"alpha_pattern['q_proj'] is 0.0; {ALPHA}"),
    "alpha of 400 digits": (
        {"lora_alpha": 10**400},
        f"lora_alpha is 1{'0' * 59}…{'0' * 60}; {ALPHA}",
    ),
    "unknown switch": (
        {"use_hyper": True, "peft_version": "1.7.0"},
        "the field 'use_hyper' is True, which this version of vllm-merge does not know (written by PEFT 1.7.0); "
        "upgrade vllm-merge, or remove the field if the factors mean the same without it",
    ),
    "unknown settings": (
        {"hyper_config": {"depth": 2}},
        "the field 'hyper_config' is {'depth': 2}, which this version of vllm-merge does not know; "
        "upgrade vllm-merge, or remove the field if the factors mean the same without it",
    ),
    "pattern that backtracks": (
        {"rank_pattern": {r"(q)\1": 2}},
        r"rank_pattern key '(q)\\1' has \1, which is not supported; \d, \w, \s and escaped signs are",
    ),
    "alpha not finite": (
        json.dumps({"peft_type": "LORA", "lora_alpha": float("inf")}).encode(),
        f"lora_alpha is inf; {ALPHA}",
    ),
    "pattern is a list": ({"alpha_pattern": ["q"]}, "alpha_pattern must map module names to numbers, found list"),
    "pattern is no expression": (
        {"alpha_pattern": {"q(": 1}},
        "alpha_pattern key 'q(' is not a regular expression (missing ), unterminated subpattern)",
    ),
    "rslora is text": ({"use_rslora": "yes"}, "use_rslora is 'yes'; allowed are true and false"),
    "base model": ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3; allowed are text and null"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_config(case: str, folder: MakeFolder) -> None:
    config, message = WRONG_CONFIGS[case]
    assert refusal(folder(config)) == CONFIG + message


def test_what_surrounds_the_mistakes_is_right(folder: MakeFolder) -> None:
    assert read_adapter(folder()).factors[MODULE].scaling == 2.0


def test_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "sql"
    assert refusal(path) == "adapter 'sql': FOLDER is not a folder; give a PEFT folder with adapter_config.json"
    path.mkdir()
    assert refusal(path) == "adapter 'sql': FOLDER has no adapter_config.json; give a folder that PEFT saved"


def test_pickle_is_never_read(folder: MakeFolder) -> None:
    path = folder()
    (path / "adapter_model.safetensors").unlink()
    again = "save the adapter with safe_serialization=True"
    assert refusal(path) == f"adapter 'sql': FOLDER has no adapter_model.safetensors; nothing else is read: {again}"
    (path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert refusal(path) == (
        "adapter 'sql': FOLDER has no adapter_model.safetensors; it has adapter_model.bin, and pickle is "
        f"never read: {again}"
    )


def tensors(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A right pair with tensors replaced, added, or (None) removed; `A`, `B` and full names."""
    right = {"A": torch.ones(4, 6), "B": torch.ones(5, 4)}
    return {
        f"{Q}.lora_{name}.weight" if len(name) == 1 else name: tensor
        for name, tensor in {**right, **changes}.items()
        if tensor is not None
    }


ONLY_PLAIN = "only plain LoRA adapters can be merged"
EMBED = "base_model.model.model.embed_tokens"
VALUES = ("NaN", "infinite", "NaN in an embedding")  # what is not seen in a header
EMPTY = "a rank of 0 or an empty factor usually means that sharded weights were not gathered before saving"
LINEAR = "only linear layers and embeddings, whose factors have two dimensions, can be merged"
NO_EMBEDDINGS = "only LoRA factors can be merged: save the adapter with save_embedding_layers=False"
WRONG_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "nothing": ({}, "no lora_A and lora_B tensors; this adapter changes nothing"),
    "A without B": (tensors(B=None), f"module '{MODULE}' has lora_A but no lora_B; save the adapter again"),
    "B without A": (tensors(A=None), f"module '{MODULE}' has lora_B but no lora_A; save the adapter again"),
    "shapes": (
        tensors(B=torch.ones(5, 3)),
        f"module '{MODULE}': lora_B [5, 3] · lora_A [4, 6] do not multiply; expected (d_out, r) and (r, d_in)",
    ),
    "rank of the config": (
        tensors(A=torch.ones(2, 6), B=torch.ones(5, 2)),
        f"module '{MODULE}' has rank 2 and adapter_config.json says 4; correct r or rank_pattern, on which "
        "the scaling depends",
    ),
    "rank 0": (
        tensors(A=torch.ones(0, 6), B=torch.ones(5, 0)),
        f"module '{MODULE}' has lora_A [0, 6] and lora_B [5, 0]; {EMPTY}",
    ),
    "convolution": (
        tensors(A=torch.ones(4, 6, 1, 1)),
        f"module '{MODULE}' has lora_A [4, 6, 1, 1] and lora_B [5, 4]; {LINEAR}",
    ),
    "one-dimensional": (tensors(A=torch.ones(0)), f"module '{MODULE}' has lora_A [0] and lora_B [5, 4]; {LINEAR}"),
    "NaN": (
        tensors(A=torch.full((4, 6), float("nan"))),
        f"module '{MODULE}': lora_A has 24 NaN or infinite values; train or save the adapter again",
    ),
    "infinite": (
        tensors(B=torch.tensor([[1.0, 2, 3, float("-inf")]])),
        f"module '{MODULE}': lora_B has 1 NaN or infinite values; train or save the adapter again",
    ),
    "DoRA magnitude": (
        tensors(**{f"{Q}.lora_magnitude_vector": torch.ones(5)}),
        f"tensor '{Q}.lora_magnitude_vector' is a DoRA magnitude, which is not a low-rank update; {ONLY_PLAIN}",
    ),
    "half an embedding": (
        tensors(**{f"{EMBED}.lora_embedding_A": torch.ones(4, 9)}),
        "module 'model.embed_tokens' has lora_embedding_A but no lora_embedding_B; save the adapter again",
    ),
    "an embedding transposed": (
        tensors(**{f"{EMBED}.lora_embedding_A": torch.ones(9, 4), f"{EMBED}.lora_embedding_B": torch.ones(4, 6)}),
        "module 'model.embed_tokens': lora_embedding_B [4, 6] · lora_embedding_A [9, 4] do not multiply; expected "
        "(features, r) and (r, tokens)",
    ),
    "an embedding's rank": (
        tensors(**{f"{EMBED}.lora_embedding_A": torch.ones(2, 9), f"{EMBED}.lora_embedding_B": torch.ones(6, 2)}),
        "module 'model.embed_tokens' has rank 2 and adapter_config.json says 4; correct r or rank_pattern, on which "
        "the scaling depends",
    ),
    "an embedding twice": (
        tensors(**{f"{EMBED}.lora_embedding_A{end}": torch.ones(4, 9) for end in ("", ".default")}),
        f"module 'model.embed_tokens' has two lora_embedding_A, '{EMBED}.lora_embedding_A' and "
        f"'{EMBED}.lora_embedding_A.default'; save one adapter per file",
    ),
    "linear and embedding at once": (
        tensors(B=None, **{f"{Q}.lora_embedding_B": torch.ones(5, 4)}),
        f"module '{MODULE}' has lora_A and lora_embedding_B but no lora_B; save the adapter again",
    ),
    "NaN in an embedding": (
        tensors(
            **{
                f"{EMBED}.lora_embedding_A": torch.ones(4, 9),
                f"{EMBED}.lora_embedding_B": torch.full((6, 4), torch.nan),
            }
        ),
        "module 'model.embed_tokens': lora_embedding_B has 24 NaN or infinite values; train or save the adapter again",
    ),
    "whole embedding": (
        tensors(**{"base_model.model.model.embed_tokens.weight": torch.ones(9, 6)}),
        f"tensor 'base_model.model.model.embed_tokens.weight' is a whole weight; {NO_EMBEDDINGS}",
    ),
    "base weight alone": (
        tensors(**{"base_model.model.lm_head.base_layer.weight": torch.ones(9, 6)}),
        f"tensor 'base_model.model.lm_head.base_layer.weight' is a weight of a module without LoRA; {NO_EMBEDDINGS}",
    ),
    "foreign tensor": (
        tensors(**{"model.q_proj.lora_A.weight": torch.ones(4, 6)}),
        "tensor 'model.q_proj.lora_A.weight' is not part of a LoRA adapter; expected names are "
        "base_model.model.<module>.lora_A.weight and base_model.model.<module>.lora_B.weight, of an embedding "
        "lora_embedding_A and lora_embedding_B",
    ),
    "bias": (
        tensors(**{f"{Q}.lora_B.bias": torch.ones(5)}),
        f"tensor '{Q}.lora_B.bias' is not part of a LoRA adapter; expected names are "
        "base_model.model.<module>.lora_A.weight and base_model.model.<module>.lora_B.weight, of an embedding "
        "lora_embedding_A and lora_embedding_B",
    ),
    "two adapters in one file": (
        tensors(**{f"{Q}.lora_A.other.weight": torch.ones(4, 6)}),
        f"module '{MODULE}' has two lora_A, '{Q}.lora_A.other.weight' and '{Q}.lora_A.weight'; save one "
        "adapter per file",
    ),
    "no module": (
        tensors(**{"base_model.model.a\nb.lora_A.weight": torch.ones(4, 6)}),
        "tensor 'base_model.model.a\\nb.lora_A.weight' is of no module; a name has 1 to 512 printable characters",
    ),
    "dtype": (
        tensors(A=torch.ones(4, 6, dtype=torch.int8)),
        f"tensor '{Q}.lora_A.weight' has dtype I8; allowed are F32, F16, BF16: convert the adapter to one",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors(case: str, folder: MakeFolder) -> None:
    content, message = WRONG_TENSORS[case]
    assert refusal(folder(tensors=content)) == WEIGHTS + message


@pytest.mark.parametrize("case", [name for name in WRONG_TENSORS if name not in VALUES])
def test_headers_alone_are_checked_alike(case: str, folder: MakeFolder) -> None:
    content, message = WRONG_TENSORS[case]
    path = folder(tensors=content)
    with pytest.raises(UserInputError) as caught:
        read_shapes(path)
    assert str(caught.value).replace(str(path), "FOLDER") == WEIGHTS + message


def one(dtype: str = "F32", shape: list[Any] | None = None, offsets: list[int] | None = None) -> dict[str, Any]:
    return {"x": {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": offsets or [0, 8]}}


WRONG_FILES: dict[str, tuple[Any, bytes, str]] = {
    "header is not JSON": (
        b"{,",
        b"",
        "the safetensors header is not valid JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
    ),
    "header is not UTF-8": (
        b'{"\xff": 1}',
        b"",
        "the safetensors header is not valid JSON ('utf-8' codec can't decode byte 0xff in position 2: "
        "invalid start byte)",
    ),
    "header is a list": ([], b"", "the safetensors header is not a JSON object"),
    "header nested without end": (
        b"[" * 100_000,
        b"",
        "the safetensors header is not valid JSON (maximum recursion depth exceeded while decoding a JSON "
        "array from a unicode string)",
    ),
    "key twice": (b'{"x": 1, "x": 2}', b"", "the safetensors header is not valid JSON (a key is given twice)"),
    "no shape": ({"x": {"dtype": "F32"}}, b"", "tensor 'x' is not described by dtype, shape and data_offsets"),
    "too many dimensions": (
        one(shape=[1] * 9),
        b"0" * 4,
        "tensor 'x' is not described by dtype, shape and data_offsets",
    ),
    "offset of 4000 digits": (
        one(offsets=[0, 10**4000]),
        b"0" * 8,
        "tensor 'x' is not described by dtype, shape and data_offsets",
    ),
    "strange dtype": (
        one(dtype="\x1b[31m"),
        b"0" * 8,
        "tensor 'x' has dtype '\\x1b[31m'; allowed are F32, F16, BF16: convert the adapter to one",
    ),
    "negative shape": (one(shape=[-2]), b"0" * 8, "tensor 'x' is not described by dtype, shape and data_offsets"),
    "past the end": (
        one(offsets=[0, 8]),
        b"0" * 4,
        "tensor 'x' claims bytes 0 to 8 and the file holds 4; it is truncated or damaged, copy it again",
    ),
    "before the beginning": (
        one(offsets=[-8, 0]),
        b"0" * 8,
        "tensor 'x' claims bytes -8 to 0 and the file holds 8; it is truncated or damaged, copy it again",
    ),
    "shape and bytes": (one(shape=[3]), b"0" * 8, "tensor 'x' of shape [3] and F32 needs 12 bytes, it has 8"),
    "huge shape": (
        one(shape=[2**40, 2**40]),
        b"0" * 8,
        f"tensor 'x' of shape [{2**40}, {2**40}] and F32 needs {2**82:,} bytes, it has 8",
    ),
    "tail": (one(), b"0" * 9, "1 bytes follow the last tensor; the file is damaged"),
    "gap": (one(offsets=[4, 12]), b"0" * 12, "tensor 'x' begins at byte GAP: tensors overlap or leave a gap"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_damaged_files(case: str, folder: MakeFolder, raw_file: Callable[[Any, bytes], bytes]) -> None:
    header, data, message = WRONG_FILES[case]
    raw = raw_file(header, data)
    start = len(raw) - len(data)
    found = refusal(folder(raw=raw))
    expected = WEIGHTS + message.replace("GAP", f"{start + 4:,}, expected {start:,}")
    # The parser's recursion limit is worded differently by different versions of Python.
    assert found == expected or (case == "header nested without end" and "maximum recursion depth exceeded" in found)


def test_short_and_lying_lengths(folder: MakeFolder) -> None:
    assert refusal(folder(raw=b"1234")) == (
        WEIGHTS + "4 bytes is too short for a safetensors file; copy the adapter again"
    )
    assert refusal(folder(raw=struct.pack("<Q", 100) + b"{}")) == (
        WEIGHTS + "the header claims 100 bytes and the file has 10; it is truncated, copy it again"
    )
    assert refusal(folder(raw=struct.pack("<Q", 2**63))) == (
        WEIGHTS + "the header claims 9,223,372,036,854,775,808 bytes, at most 16,777,216 are read; "
        "this is not a safetensors file of a LoRA adapter"
    )


def test_sparse_file_of_any_size_is_refused(folder: MakeFolder) -> None:
    path = folder()
    with (path / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(2**40)
    message = WEIGHTS + "1,099,511,627,776 bytes; at most 68,719,476,736 are read; this is no LoRA adapter"
    assert refusal(path) == message
    with pytest.raises(UserInputError, match="at most 68,719,476,736 are read"):
        read_shapes(path)


def test_files_that_may_not_be_read(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder()

    def forbidden(self: Path, *args: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", forbidden)
    assert refusal(path) == "adapter 'sql': FOLDER/adapter_config.json cannot be read: Permission denied"


def test_too_many_patterns_for_too_many_modules(folder: MakeFolder) -> None:
    pattern = {f"a{i}*": 4 for i in range(900)}
    modules = {f"base_model.model.{'m' * 400}{i}": None for i in range(140)}
    content = {
        f"{module}.lora_{part}.weight": torch.ones(shape)
        for module in modules
        for part, shape in (("A", (4, 1)), ("B", (1, 4)))
    }
    assert refusal(folder({"rank_pattern": pattern}, content)) == (
        "adapter 'sql': FOLDER/adapter_config.json has 900 patterns for 140 modules, more than are matched; write each as the "
        r"module's whole name between ^ and $, with \\. for its dots"
    )
