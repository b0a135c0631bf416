# SPDX-License-Identifier: Apache-2.0
"""Reading and writing PEFT folders: hashes, names, warnings, bytes, and nothing half written."""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_merge.adapters import peft_config
from vllm_merge.adapters.factors import LoraFactors
from vllm_merge.adapters.folders import new_folder
from vllm_merge.adapters.peft import hash_adapter, read_adapter, read_shapes, write_adapter
from vllm_merge.adapters.peft_config import parse_config
from vllm_merge.errors import MergeError, UserInputError

MakeFolder = Callable[..., Path]
MakePair = Callable[..., dict[str, torch.Tensor]]
MODULE = "model.layers.0.self_attn.q_proj"


def test_what_is_read(folder: MakeFolder, make_pair: MakePair) -> None:
    path = folder({"base_model_name_or_path": "org/base", "use_rslora": True})
    adapter = read_adapter(path)
    found = adapter.factors[MODULE]
    assert (adapter.name, adapter.base_model) == ("sql", "org/base")
    assert found.scaling == 8 / math.sqrt(4)
    assert torch.equal(found.A, make_pair()[f"base_model.model.{MODULE}.lora_A.weight"])
    assert adapter.metadata["warnings"] == ()


def test_adapter_name_in_the_keys(folder: MakeFolder, make_pair: MakePair) -> None:
    named = {key.replace(".weight", ".default.weight"): tensor for key, tensor in make_pair().items()}
    assert list(read_adapter(folder(tensors=named)).factors) == [MODULE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixed_dtypes(dtype: torch.dtype, folder: MakeFolder, make_pair: MakePair) -> None:
    content = make_pair() | make_pair("base_model.model.lm_head", dtype=dtype)
    adapter = read_adapter(folder(tensors=content))
    assert adapter.factors["lm_head"].B.dtype == dtype
    assert torch.equal(adapter.factors["lm_head"].B, content["base_model.model.lm_head.lora_B.weight"])


def test_unaligned_tensors_are_read(folder: MakeFolder, raw_file: Callable[[Any, bytes], bytes]) -> None:
    """A file that another writer did not pad: the tensors begin at an odd byte."""
    key = f"base_model.model.{MODULE}.lora_"
    header = {
        f"{key}A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        f"{key}B.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [8, 12]},
    }
    for padding in range(4):
        text = json.dumps(header).encode() + b" " * padding
        raw = raw_file(text, torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
        found = read_adapter(folder({"r": 1}, raw=raw)).factors[MODULE]
        assert (found.A.tolist(), found.B.tolist()) == ([[1.0, 2.0]], [[3.0]])


def test_warnings(folder: MakeFolder, make_pair: MakePair) -> None:
    copy = {"base_model.model.lm_head.base_layer.weight": torch.ones(5, 6)}
    path = folder(
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 2}},
        make_pair() | make_pair("base_model.model.lm_head") | copy,
    )
    expected = (
        "tensor 'base_model.model.lm_head.base_layer.weight' is a copy of a base weight and is ignored",
        "rank_pattern key 'k_proj' matches no module of the adapter and has no effect",
        "alpha_pattern key 'v_proj' matches no module of the adapter and has no effect",
    )
    assert read_adapter(path).metadata["warnings"] == expected
    assert read_shapes(path).warnings == expected


def test_shapes(folder: MakeFolder) -> None:
    found = read_shapes(folder())
    assert found.modules == {MODULE: (5, 6, 4)}
    assert found.dtypes == ("F32",)
    assert found.size_bytes == (folder() / "adapter_model.safetensors").stat().st_size


def test_hash_is_that_of_the_parsed_bytes(folder: MakeFolder) -> None:
    path = folder()
    assert hash_adapter(path) == read_adapter(path).content_hash
    assert len(hash_adapter(path)) == 64


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": ["x"]},
        {"lora_dropout": 0.5},
        {"base_model_name_or_path": "other"},
        {"task_type": "X"},
        {"lora_alpha": 8.0},
        {"rank_pattern": None},
    ],
)
def test_hash_ignores(change: dict[str, Any], folder: MakeFolder) -> None:
    assert hash_adapter(folder(change)) == hash_adapter(folder())


@pytest.mark.parametrize(
    "change",
    [{"r": 5}, {"lora_alpha": 9}, {"use_rslora": True}, {"rank_pattern": {"q": 4}}, {"alpha_pattern": {"q": 4}}],
)
def test_hash_covers(change: dict[str, Any], folder: MakeFolder) -> None:
    assert hash_adapter(folder(change)) != hash_adapter(folder())


def test_hash_covers_the_order_of_patterns(folder: MakeFolder) -> None:
    first = hash_adapter(folder({"alpha_pattern": {"q_proj": 1, ".*": 2}}))
    assert hash_adapter(folder({"alpha_pattern": {".*": 2, "q_proj": 1}})) != first


def test_hash_covers_every_byte(folder: MakeFolder, make_pair: MakePair) -> None:
    before = hash_adapter(folder())
    changed = make_pair()
    changed[f"base_model.model.{MODULE}.lora_B.weight"][4, 3] += 1e-6
    assert hash_adapter(folder(tensors=changed)) != before


def test_changed_content_is_refused(folder: MakeFolder, make_pair: MakePair) -> None:
    path = folder()
    before = hash_adapter(path)
    assert read_adapter(path, expected_hash=before).content_hash == before
    after = hash_adapter(folder(tensors={key: tensor * 2 for key, tensor in make_pair().items()}))
    with pytest.raises(UserInputError) as caught:
        read_adapter(path, "mine", expected_hash=before)
    assert str(caught.value) == (
        f"adapter 'mine' ({path}): the content changed since it was registered: expected hash {before[:12]}, "
        f"found {after[:12]}; register it again or restore the files"
    )


def test_the_tensors_do_not_change_with_the_file(folder: MakeFolder, make_pair: MakePair) -> None:
    path = folder()
    adapter = read_adapter(path)
    with (path / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-96, 2)
        file.write(b"\xff" * 96)
    assert torch.equal(adapter.factors[MODULE].A, make_pair()[f"base_model.model.{MODULE}.lora_A.weight"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_damage_is_an_error_or_harmless(position: int, value: int, cut: int, folder: MakeFolder) -> None:
    """Whatever byte is wrong, the answer is UserInputError or an adapter: never a crash."""
    raw = bytearray((folder() / "adapter_model.safetensors").read_bytes())
    raw[position % len(raw)] = value
    path = folder(raw=bytes(raw[: len(raw) - cut]))
    message = ""
    try:
        shapes = {name: (pair.shape, pair.rank) for name, pair in read_adapter(path).factors.items()}
    except UserInputError as error:
        message = str(error)
    if message:
        assert message.startswith(f"adapter 'sql': {path}/adapter_model.safetensors: ")
    else:
        assert cut == 0
        assert list(shapes.values()) == [((5, 6), 4)]  # a value or a letter of the name changed, nothing else


def some_factors(scaling: float = 1.0) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{layer}.q-proj": LoraFactors(
            torch.randn(layer + 1, 6, generator=generator), torch.randn(5, layer + 1, generator=generator), scaling
        )
        for layer in range(3)
    }


def test_written_bytes_are_deterministic(tmp_path: Path) -> None:
    factors = some_factors()
    write_adapter(tmp_path / "a", factors, base_model="b")
    write_adapter(tmp_path / "b", dict(reversed(factors.items())), base_model="b")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_save_load_save_is_the_same_bytes(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", some_factors(scaling=0.3), base_model="b")
    write_adapter(tmp_path / "b", read_adapter(tmp_path / "a").factors, base_model="b")
    assert hash_adapter(tmp_path / "a") == hash_adapter(tmp_path / "b")


def test_scaling_is_folded(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", some_factors(scaling=0.3), base_model=None)
    for module, found in read_adapter(tmp_path / "a").factors.items():
        torch.testing.assert_close(found.delta(), some_factors(scaling=0.3)[module].delta())


def test_patterns_are_exact_and_safe(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", some_factors(), base_model=None)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["rank_pattern"] == {r"^layers\.0\.q-proj$": 1, r"^layers\.1\.q-proj$": 2}
    assert config["target_modules"] == ["layers.0.q-proj", "layers.1.q-proj", "layers.2.q-proj"]


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    broken = some_factors() | {"x": LoraFactors(torch.full((1, 6), float("nan")), torch.ones(5, 1))}
    with pytest.raises(MergeError, match="lora_A of module 'x' is not finite; nothing was written"):
        write_adapter(tmp_path / "a", broken, base_model=None)
    with pytest.raises(MergeError, match="there is no module to write"):
        write_adapter(tmp_path / "a", {}, base_model=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/mine").write_text("mine")
    with pytest.raises(UserInputError, match=r"a: exists and is not an empty folder; choose another or remove it"):
        write_adapter(tmp_path / "a", some_factors(), base_model=None)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_new_folder_is_whole_or_absent(tmp_path: Path) -> None:

    def fail_midway() -> None:
        with new_folder(tmp_path / "deep/a") as temporary:
            (temporary / "half").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep/a").mkdir()
    with new_folder(tmp_path / "deep/a") as temporary:
        (temporary / "whole").write_text("whole")
        assert list((tmp_path / "deep/a").iterdir()) == []
    assert [path.name for path in (tmp_path / "deep/a").iterdir()] == ["whole"]


@settings(max_examples=300, deadline=None)
@given(
    keys=st.lists(
        st.sampled_from(
            ["q_proj", r"^layers\.1\.q_proj$", r"layers\.[01]\..*", "k_proj", r"^k-proj$", ".*", "proj", "1.q_proj"]
        ),
        unique=True,
    )
)
def test_patterns_match_as_in_peft(keys: list[str]) -> None:
    """Against the rule itself: the first key for which re.match((.*\\.)?(key)$) succeeds."""
    modules = [
        "layers.0.q_proj",
        "layers.1.q_proj",
        "layers.11.q_proj",
        "k-proj",
        "x.layers.1.q_proj",
        "layers.1.k_proj",
    ]
    fields = {"peft_type": "LORA", "r": 99, "rank_pattern": {key: index + 1 for index, key in enumerate(keys)}}
    config = parse_config(json.dumps(fields).encode(), Path("adapter_config.json"))
    hits = {
        module: [index + 1 for index, key in enumerate(keys) if re.match(rf"(.*\.)?({key})$", module)]
        for module in modules
    }
    assert config.ranks(modules) == {module: (hit or [99])[0] for module, hit in hits.items()}
    unmatched = [key for index, key in enumerate(keys) if not any(index + 1 in hit for hit in hits.values())]
    assert [sentence.split("'")[1].replace("\\\\", "\\") for sentence in config.warnings(modules)] == unmatched


def test_many_patterns_are_quick() -> None:
    modules = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(20_000)]
    pattern = {f"^{name.replace('.', chr(92) + '.')}$": 2 for name in modules}
    config = parse_config(json.dumps({"peft_type": "LORA", "r": 1, "rank_pattern": pattern}).encode(), Path("c"))
    started = time.perf_counter()
    assert set(config.ranks(modules).values()) == {2}
    assert config.warnings(dict.fromkeys(modules)) == []
    assert time.perf_counter() - started < 10  # one by one it would be hours


def test_unknown_fields_that_switch_nothing_on(folder: MakeFolder) -> None:
    path = folder({"new_size": 16, "new_words": "a", "new_switch": False, "new_list": [], "new_nothing": None})
    assert read_adapter(path).metadata["warnings"] == (
        "the field 'new_size' of adapter_config.json is not known and not used",
        "the field 'new_words' of adapter_config.json is not known and not used",
    )


def test_every_field_that_peft_writes_is_known(folder: MakeFolder) -> None:
    """An adapter of the installed PEFT is read without a word; a field that it adds is looked at here first."""
    peft = pytest.importorskip("peft")
    fields = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    written = {name: list(value) if isinstance(value, set) else value for name, value in fields.items()}
    known = peft_config._READ_FIELDS | peft_config._HARMLESS_FIELDS | peft_config._REFUSED_FIELDS.keys()
    assert written.keys() <= known
    assert read_adapter(folder({**written, "peft_type": "LORA"})).metadata["warnings"] == ()
