# SPDX-License-Identifier: Apache-2.0
"""PEFT LoRA folders in and out: adapter_config.json and adapter_model.safetensors.

An adapter's content hash is SHA-256 over the fields of the configuration that decide ΔW (r, lora_alpha, rank_pattern,
alpha_pattern, use_rslora, as canonical JSON) and over every byte of the safetensors file. Names, target modules,
dropout and the like do not enter it. Of a report beside, the state of a sequential merge does (`sequence_state`).
`read_adapter` hashes the very bytes that it parses.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.file_factors import FileFactors
from vllm_merge.adapters.file_layout import file_layout
from vllm_merge.adapters.folders import new_folder
from vllm_merge.adapters.peft_config import MAX_CONFIG_BYTES, LoraConfig, parse_config
from vllm_merge.adapters.reading import Memory, feed, host_memory, memory_on, read_hashed
from vllm_merge.adapters.sequence_state import canonical_state, read_state
from vllm_merge.adapters.tensor_file import header_text, read_header
from vllm_merge.adapters.tensor_names import Part, TensorName
from vllm_merge.errors import MergeError, UserInputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_HASH_DOMAIN = b"vllm-merge adapter 1\n"
_READERS = 16  # threads; each reads and hashes about a gigabyte a second

Wanted = TypeVar("Wanted")


@dataclass(frozen=True)
class AdapterShapes:
    """A PEFT folder without its values. modules: name -> (d_out, d_in, rank); size_bytes: of the safetensors file;
    continues: the sequential method that can go on from it, if one wrote it; embeddings: which modules are embeddings,
    (features, tokens, rank)."""

    config: LoraConfig
    modules: Mapping[str, tuple[int, int, int]]
    dtypes: tuple[str, ...]
    size_bytes: int
    warnings: tuple[str, ...]
    continues: str | None = None
    embeddings: frozenset[str] = frozenset()


def read_adapter(
    path: str | Path,
    name: str | None = None,
    *,
    expected_hash: str | None = None,
    device: str | torch.device | None = None,
) -> Adapter:
    """Read the PEFT folder `path` as the adapter `name` (default: the folder's name).

    Factors keep the file's dtype (float32, float16 or bfloat16), on the device (default: the CPU); the scaling is
    alpha/r, or alpha/√r for rsLoRA, per module. Raises UserInputError for anything that is not a plain LoRA, and where
    the content does not have the `expected_hash`.
    """
    memory = memory_on(torch.device(device if device is not None else "cpu"))
    return parse_adapter(read_bytes(path, name, expected_hash=expected_hash, memory=memory))


def read_each(read: Callable[[Wanted], Adapter], wanted: Iterable[Wanted]) -> list[Adapter]:
    """read(one) of each, several at a time: files are read and hashed outside of the interpreter. Raises what the first to fail raises."""
    readers = min(_READERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(readers, "vllm-merge-read", **_on_this_stream()) as threads:
        return list(threads.map(read, wanted))


def _on_this_stream() -> dict[str, Any]:
    """What gives new threads the GPU and the stream of this one."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    return {"initializer": torch.cuda.set_stream, "initargs": (torch.cuda.current_stream(),)}


@dataclass(frozen=True)
class ReadAdapter:
    """A PEFT folder's content as it was read and hashed. data: (bytes of the safetensors file,) uint8; head: the first of
    them, up to the tensors."""

    folder: Path
    name: str
    config: LoraConfig
    data: torch.Tensor
    head: bytes
    state: Mapping[str, object]
    content_hash: str


def size_of(path: str | Path) -> int:
    """Bytes of the safetensors file of the PEFT folder `path`; 0 if there is none, of which `read_bytes` says more."""
    try:
        return (Path(path) / WEIGHTS_FILE).stat().st_size
    except OSError:
        return 0


def read_bytes(
    path: str | Path,
    name: str | None = None,
    *,
    expected_hash: str | None = None,
    memory: Memory = host_memory,
) -> ReadAdapter:
    """The first half of `read_adapter`, nearly all of it outside of the interpreter. memory: where to read it to."""
    folder = Path(path)
    name = name if name is not None else folder.resolve().name
    with _naming(name):
        config = _read_config(folder)
        digest = _digest(config)
        data, head = read_hashed(folder / WEIGHTS_FILE, digest, memory)
        state = read_state(folder)
    content_hash = _content_hash(digest, state)
    if expected_hash is not None and content_hash != expected_hash:
        raise UserInputError(
            f"adapter {name!r} ({folder}): the content changed since it was registered: expected hash "
            f"{expected_hash[:12]}, found {content_hash[:12]}; register it again or restore the files"
        )
    return ReadAdapter(folder, name, config, data, head, state, content_hash)


def parse_adapter(read: ReadAdapter, *, check_values: bool = True) -> Adapter:
    """The second half of `read_adapter`: an adapter of views of the bytes. check_values: look for NaN and infinity."""
    weights, size = read.folder / WEIGHTS_FILE, read.data.numel()
    with _naming(read.name):
        file = file_layout(header_text(read.head, size, weights), size, read.config, weights)
        factors = FileFactors(read.data, file)
        if check_values and (found := factors.not_finite()) is not None:
            tensor, count = found
            raise UserInputError(
                f"{weights}: module {tensor.module!r}: {tensor.kind} has {count} NaN or infinite values; "
                "train or save the adapter again"
            )
    metadata = {
        "path": str(read.folder.resolve()),
        "revision": read.config.revision,
        "warnings": file.warnings,
        "continuation": read.state,
    }
    base_model = read.config.base_model
    adapter = Adapter(read.name, factors, content_hash=read.content_hash, base_model=base_model, metadata=metadata)
    adapter.found.places = factors.places()
    return adapter


def hash_adapter(path: str | Path) -> str:
    """The content hash of the PEFT folder `path`, 64 hexadecimal digits, without building a tensor."""
    folder = Path(path)
    with _naming(folder.resolve().name):
        digest = _digest(_read_config(folder))
        feed(folder / WEIGHTS_FILE, digest)
        return _content_hash(digest, read_state(folder))


def read_shapes(path: str | Path, name: str | None = None) -> AdapterShapes:
    """What the PEFT folder `path` holds, checked but for the values: neither tensors nor their hash are read."""
    folder = Path(path)
    name = name if name is not None else folder.resolve().name
    with _naming(name):
        config = _read_config(folder)
        header, size = read_header(folder / WEIGHTS_FILE)
        file = file_layout(header, size, config, folder / WEIGHTS_FILE)
        state = read_state(folder)
    shapes = {module: (*found.shape, found.rank) for module, found in file.modules.items()}
    dtypes = sorted({run.dtype for run in file.runs})
    embeddings = frozenset(module for module, found in file.modules.items() if found.embedding)
    return AdapterShapes(config, shapes, tuple(dtypes), size, file.warnings, state.get("method"), embeddings)


def write_adapter(folder: str | Path, factors: Mapping[str, LoraFactors], *, base_model: str | None) -> None:
    """Write `factors` as the PEFT folder `folder`, which must not exist or be empty; it appears whole or not at all.

    A scaling other than 1 is folded into B. The configuration has lora_alpha = r and gives every module its own rank
    as alpha too, so that PEFT scales by 1 everywhere. Equal factors give equal bytes. Raises MergeError where a factor
    is not finite or there is none.
    """
    if not factors:
        raise MergeError(f"{folder}: there is no module to write; PEFT cannot load an adapter without one")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for module, pair in sorted(factors.items()):
        ranks[module] = pair.rank
        factors_by_part: Mapping[Part, torch.Tensor] = {"A": pair.A, "B": pair.folded().B}
        for part, tensor in factors_by_part.items():
            name = TensorName(module, part, pair.embedding)
            if not _is_finite(tensor):
                raise MergeError(f"{folder}: {name.kind} of module {module!r} is not finite; nothing was written")
            tensors[str(name)] = tensor.detach().cpu().contiguous()
    with new_folder(Path(folder)) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        config = json.dumps(written_config(ranks, base_model), indent=2, sort_keys=True)
        (temporary / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def written_config(ranks: Mapping[str, int], base_model: str | None) -> dict[str, object]:
    """What adapter_config.json says of an adapter with scaling 1. ranks: {module: its rank}."""
    largest = max(ranks.values())
    # Anchored and escaped, so that a key matches its module and no other under PEFT's matching of name endings.
    smaller = {f"^{_escape(module)}$": rank for module, rank in sorted(ranks.items()) if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _escape(module: str) -> str:
    # Like re.escape without escaping '-', which is only special in brackets: the keys stay readable.
    return re.escape(module).replace("\\-", "-")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in every error which adapter it is about; a file that cannot be read is an error of the user's too."""
    try:
        yield
    except UserInputError as error:
        raise UserInputError(f"adapter {name!r}: {error}") from None
    except OSError as error:
        raise UserInputError(f"adapter {name!r}: {error.filename} cannot be read: {error.strerror}") from None


def _read_config(folder: Path) -> LoraConfig:
    if not folder.is_dir():
        raise UserInputError(f"{folder} is not a folder; give a PEFT folder with {CONFIG_FILE}")
    config = folder / CONFIG_FILE
    if not config.is_file():
        raise UserInputError(f"{folder} has no {CONFIG_FILE}; give a folder that PEFT saved")
    if not (folder / WEIGHTS_FILE).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"})
        found = f"it has {', '.join(pickles)}, and pickle is never read" if pickles else "nothing else is read"
        raise UserInputError(f"{folder} has no {WEIGHTS_FILE}; {found}: save the adapter with safe_serialization=True")
    with config.open("rb") as file:
        return parse_config(file.read(MAX_CONFIG_BYTES + 1), config)


def _digest(config: LoraConfig) -> "hashlib._Hash":
    """Of the content hash, before the weights."""
    return hashlib.sha256(_HASH_DOMAIN + config.canonical() + b"\n")


def _content_hash(digest: "hashlib._Hash", state: Mapping[str, object]) -> str:
    """digest: with the weights."""
    digest.update(canonical_state(state))
    return digest.hexdigest()


def _is_finite(tensor: torch.Tensor) -> bool:
    # Many times quicker than isfinite over all entries, and without a temporary; NaN is passed on by both.
    least, most = torch.aminmax(tensor)
    return bool(torch.isfinite(least) and torch.isfinite(most))
