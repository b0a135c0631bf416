# SPDX-License-Identifier: Apache-2.0
"""The catalogue of registered adapters, and the hash of a base model."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_merge.adapters import catalogue as module
from vllm_merge.adapters.base_model import base_model_hash
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.adapters.hub import adapter_folder
from vllm_merge.adapters.peft import hash_adapter
from vllm_merge.errors import UserInputError

MakeFolder = Callable[..., Path]
MakePair = Callable[..., dict[str, torch.Tensor]]


def test_summary(folder: MakeFolder, make_pair: MakePair) -> None:
    path = folder(
        {"rank_pattern": {"lm_head": 2}, "base_model_name_or_path": "org/base"},
        make_pair() | make_pair("base_model.model.lm_head", rank=2),
    )
    found = Catalogue().register("mine", path)
    assert (found.name, found.path) == ("mine", path)
    assert found.shapes["lm_head"] == (5, 6, 2)
    assert found.summary.to_dict() == {
        "base_model": "org/base",
        "modules": 2,
        "ranks": {2: 1, 4: 1},
        "parameters": 11 * 6,
        "size_bytes": (path / "adapter_model.safetensors").stat().st_size,
        "dtypes": ("F32",),
        "warnings": (),
    }
    assert found.summary.rank == 4


def test_a_wrong_adapter_changes_nothing(folder: MakeFolder, tmp_path: Path) -> None:
    catalogue = Catalogue()
    catalogue.register("mine", folder())
    with pytest.raises(
        UserInputError, match=rf"^adapter 'mine': {tmp_path}/nothing is not a folder; give a PEFT folder"
    ):
        catalogue.register("mine", tmp_path / "nothing")
    assert catalogue.get("mine").path == tmp_path / "sql"
    assert catalogue.names() == ["mine"]
    assert catalogue.paths() == {"mine": tmp_path / "sql"}
    with pytest.raises(UserInputError, match=r"^no registered adapter 'other' \(known: mine\)$"):
        catalogue.get("other")


def test_hash_is_computed_once_per_content(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "hash_adapter", lambda path: calls.append(path) or hash_adapter(path))
    catalogue = Catalogue()
    path = folder()
    catalogue.register("a", path)
    catalogue.register("b", path)
    assert (
        catalogue.content_hash("a") == catalogue.content_hash("b") == catalogue.content_hash("a") == hash_adapter(path)
    )
    assert len(calls) == 1
    before = catalogue.content_hash("a")
    folder({"lora_alpha": 9})
    assert catalogue.content_hash("a") != before
    assert len(calls) == 2


def test_a_folder_that_is_gone(folder: MakeFolder) -> None:
    catalogue = Catalogue()
    path = folder()
    catalogue.register("a", path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserInputError, match=r"adapter_model.safetensors: cannot be read: No such file or directory$"):
        catalogue.content_hash("a")


def test_hub_names_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        UserInputError, match=r"^org/x is not a folder, and huggingface_hub, which fetches Hub repositories"
    ):
        adapter_folder("org/x")


HUB_REFUSALS = {
    "GatedRepoError": "org/x is a gated repository of the Hub; ask for access on its page, then log in with "
    "`hf auth login`",
    "RepositoryNotFoundError": "org/x is neither a folder nor a repository of the Hub that you may read; correct the "
    "path, or log in with `hf auth login` if it is private",
    "RevisionNotFoundError": "org/x on the Hub has no revision abc; give a branch, tag or commit that it has",
    "LocalEntryNotFoundError": "org/x at revision abc is neither a folder nor in the Hub's cache, and the Hub cannot be "
    "reached; fetch it where there is a network (`hf download org/x --revision abc`), or give a folder",
    "OSError": "org/x is not a folder and cannot be had from the Hub at revision abc: said why",
}


@pytest.mark.parametrize("kind", HUB_REFUSALS)
def test_hub_names_that_cannot_be_had(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    seen = {}

    def refuse(*args: object, **options: object) -> str:
        seen.update(options)
        error = OSError if kind == "OSError" else getattr(hub.errors, kind)
        made = error.__new__(error)
        Exception.__init__(made, "said why\nand more")
        raise made

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserInputError) as caught:
        adapter_folder("org/x", "abc")
    assert str(caught.value) == HUB_REFUSALS[kind]
    assert seen == {"revision": "abc", "allow_patterns": ["adapter_config.json", "adapter_model.safetensors"]}


def test_hub_names_when_the_network_is_forbidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserInputError) as caught:
        Catalogue().register("mine", "org/x", "abc")
    assert str(caught.value) == (
        "adapter 'mine': org/x at revision abc is neither a folder nor in the Hub's cache, and HF_HUB_OFFLINE forbids "
        "the network; unset it, fetch it where there is a network (`hf download org/x --revision abc`), or give a folder"
    )


def test_hub_names_are_read_from_the_cache(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache as the Hub's library lays it out; no network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    cache = tmp_path / "cache/models--org--x/snapshots" / ("a" * 40)
    cache.parent.mkdir(parents=True)
    folder().rename(cache)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    catalogue = Catalogue()
    assert catalogue.register("mine", "org/x", "a" * 40).path == cache
    assert catalogue.content_hash("mine") == hash_adapter(cache)


def model(path: Path, seed: int = 0, config: str = "{}", shards: int = 2) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    generator = torch.Generator().manual_seed(seed)
    for shard in range(shards):
        save_file({"w": torch.randn(300, 1000, generator=generator)}, path / f"model-{shard}.safetensors")
    return path


def test_base_model_hash(tmp_path: Path) -> None:
    first = base_model_hash(model(tmp_path / "a"))
    assert len(first) == 64
    assert base_model_hash(model(tmp_path / "copy")) == first
    assert base_model_hash(model(tmp_path / "b", seed=1)) != first
    assert base_model_hash(model(tmp_path / "c", config='{"x": 1}')) != first
    assert base_model_hash(model(tmp_path / "d", shards=1)) != first
    (tmp_path / "copy/tokenizer.json").write_text("{}")
    assert base_model_hash(tmp_path / "copy") == first  # not a weight
    (tmp_path / "copy/model-1.safetensors").rename(tmp_path / "copy/model-2.safetensors")
    assert base_model_hash(tmp_path / "copy") != first


def test_base_model_hash_reads_little(tmp_path: Path) -> None:
    """A sparse file of 64 GB takes no time; its first and last bytes count."""
    model(tmp_path / "a")
    big = tmp_path / "a/model-9.safetensors"
    with big.open("wb") as file:
        file.truncate(64 * 2**30)
    first = base_model_hash(tmp_path / "a")
    with big.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert base_model_hash(tmp_path / "a") != first


def test_base_model_hash_of_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def cached(name: str, **options: object) -> str:
        if name == "org/cached":
            return str(model(tmp_path / "snapshot"))
        raise hub.errors.LocalEntryNotFoundError("no")

    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert base_model_hash("org/cached") == base_model_hash(tmp_path / "snapshot")
    names = {base_model_hash("org/other"), base_model_hash("org/other", "v2"), base_model_hash("org/third")}
    assert len(names) == 3
    assert base_model_hash("org/other") in names
