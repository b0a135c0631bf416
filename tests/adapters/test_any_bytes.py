# SPDX-License-Identifier: Apache-2.0
"""Whatever an adapter's two files hold, reading it gives an adapter or UserInputError, in little time and memory."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_merge.adapters.peft import hash_adapter, read_adapter, read_shapes
from vllm_merge.errors import UserInputError

MakeFolder = Callable[..., Path]
RawFile = Callable[[Any, bytes], bytes]
Q = "base_model.model.m.q.lora_"
HEADER = {
    f"{Q}A.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    f"{Q}B.weight": {"dtype": "BF16", "shape": [1, 4], "data_offsets": [32, 40]},
}
INTEGERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), INTEGERS, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "bias",
        "init_lora_weights",
        "revision",
    ]
)
PATTERNS = st.dictionaries(st.text("mq.*+?()[]{}|^$\\d1,", max_size=12), INTEGERS, max_size=3)
quickly = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reads_or_refuses(path: Path) -> None:
    """All three readers agree on whether the folder is an adapter (the hash alone does not look into the weights)."""
    outcomes = []
    for function in (read_adapter, read_shapes, hash_adapter):
        try:
            function(path)
            outcomes.append("")
        except UserInputError as error:
            str(error).encode()
            outcomes.append(str(error))
    if not outcomes[0]:
        assert outcomes == ["", "", ""]


@quickly
@given(st.dictionaries(FIELDS | st.text(max_size=10), VALUES, max_size=4))
@example({"lora_alpha": 10**400})
@example({"r": 10**400})
@example({"base_model_name_or_path": "\ud800"})
@example({"rank_pattern": {"((((((((((a*)*)*)*)*)*)*)*)*)*)*": 4}})
def test_any_configuration(folder: MakeFolder, fields: dict[str, Any]) -> None:
    reads_or_refuses(folder(json.dumps({"peft_type": "LORA", "r": 4, **fields}).encode()))


@quickly
@given(PATTERNS, PATTERNS)
def test_any_patterns(folder: MakeFolder, ranks: dict[str, int], alphas: dict[str, int]) -> None:
    reads_or_refuses(folder({"rank_pattern": ranks, "alpha_pattern": alphas}))


@quickly
@given(st.binary(max_size=100))
def test_any_bytes(folder: MakeFolder, raw_file: RawFile, content: bytes) -> None:
    reads_or_refuses(folder(content))
    reads_or_refuses(folder(raw=content))
    reads_or_refuses(folder(raw=raw_file(content, b"\0" * 8)))


@quickly
@given(
    st.sampled_from(list(HEADER)),
    st.sampled_from(["dtype", "shape", "data_offsets", "key"]),
    VALUES,
    st.text(max_size=30),
)
@example(f"{Q}A.weight", "shape", [2**63, 2**63], "")
@example(f"{Q}A.weight", "key", None, "base_model.model.\ud800.lora_A.weight")
def test_any_header(folder: MakeFolder, raw_file: RawFile, name: str, part: str, value: Any, key: str) -> None:
    changed = {**HEADER, name: {**HEADER[name], part: value}} if part != "key" else {**HEADER, key: HEADER[name]}
    reads_or_refuses(folder(raw=raw_file(changed, b"\0" * 40)))


BOMBS = {
    "many tensors": b"{"
    + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(100_000))
    + b"}",
    "many keys": b"{" + b",".join(b'"%d":0' % i for i in range(1_000_000)) + b"}",
    "long shape": b'{"x":{"dtype":"F32","shape":[' + b"9," * 5_000_000 + b'9],"data_offsets":[0,4]}}',
    "deep": b'{"x":' + b"[" * 10_000_000,
    "long numbers": b'{"x":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 2000) + b'],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_header_bombs(bomb: str, folder: MakeFolder, raw_file: RawFile) -> None:
    path = folder(raw=raw_file(BOMBS[bomb], b"\0" * 4))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserInputError):
        read_shapes(path)
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB
