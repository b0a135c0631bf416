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
from typing import TypeVar

import torch
from safetensors.torch import save_file

from vllm_merge.adapters.factors import Adapter, LoraFactors
from vllm_merge.adapters.folders import new_folder
from vllm_merge.adapters.peft_config import MAX_CONFIG_BYTES, LoraConfig, parse_config
from vllm_merge.adapters.sequence_state import canonical_state, read_state
from vllm_merge.adapters.tensor_file import MAX_FILE_BYTES, TensorEntry, parse_header, read_header, tensor_view
from vllm_merge.adapters.tensor_names import BASE_COPY, FULL_WEIGHT_HINT, PREFIX, Part, TensorName, parse_name
from vllm_merge.adapters.words import shown
from vllm_merge.errors import MergeError, UserInputError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_HASH_DOMAIN = b"vllm-merge adapter 1\n"
_CHUNK_BYTES = 4 * 2**20
_READERS = 8  # threads; each reads and hashes about a gigabyte a second

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


@dataclass(frozen=True)
class _Factor:
    """A tensor of the file."""

    key: str
    name: TensorName
    entry: TensorEntry


_Pairs = Mapping[str, Mapping[Part, _Factor]]


def read_adapter(path: str | Path, name: str | None = None, *, expected_hash: str | None = None) -> Adapter:
    """Read the PEFT folder `path` as the adapter `name` (default: the folder's name).

    Factors keep the file's dtype (float32, float16 or bfloat16) on the CPU; the scaling is alpha/r, or alpha/√r for
    rsLoRA, per module. Raises UserInputError for anything that is not a plain LoRA, and where the content does not have
    the `expected_hash`.
    """
    return parse_adapter(read_bytes(path, name, expected_hash=expected_hash))


def read_each(read: Callable[[Wanted], Adapter], wanted: Iterable[Wanted]) -> list[Adapter]:
    """read(one) of each, several at a time: files are read and hashed outside of the interpreter. Raises what the first to fail raises."""
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "vllm-merge-read") as readers:
        return list(readers.map(read, wanted))


@dataclass(frozen=True)
class ReadAdapter:
    """A PEFT folder's content as it was read and hashed. data: (bytes of the safetensors file,) uint8."""

    folder: Path
    name: str
    config: LoraConfig
    data: torch.Tensor
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
    memory: Callable[[int], torch.Tensor] = lambda size: torch.empty(size, dtype=torch.uint8),
) -> ReadAdapter:
    """The first half of `read_adapter`, nearly all of it outside of the interpreter. memory(bytes): where to read it to."""
    folder = Path(path)
    name = name if name is not None else folder.resolve().name
    with _naming(name):
        config = _read_config(folder)
        data = _read_weights(folder / WEIGHTS_FILE, memory)
        state = read_state(folder)
    content_hash = _content_hash(config, lambda digest: digest.update(data.numpy().data), state)
    if expected_hash is not None and content_hash != expected_hash:
        raise UserInputError(
            f"adapter {name!r} ({folder}): the content changed since it was registered: expected hash "
            f"{expected_hash[:12]}, found {content_hash[:12]}; register it again or restore the files"
        )
    return ReadAdapter(folder, name, config, data, state, content_hash)


def parse_adapter(read: ReadAdapter, *, check_values: bool = True) -> Adapter:
    """The second half of `read_adapter`: an adapter of views of the bytes. check_values: look for NaN and infinity."""
    folder, config = read.folder, read.config
    with _naming(read.name):
        header = parse_header(read.data.numpy().data, folder / WEIGHTS_FILE)
        pairs, warnings = _checked_pairs(header, config, folder)
        scalings = config.scalings({module: pair["A"].entry.shape[0] for module, pair in pairs.items()})
        factors = {
            module: LoraFactors(
                *_tensors(read.data, pair, module, folder, check_values), scalings[module], pair["A"].name.embedding
            )
            for module, pair in pairs.items()
        }
    metadata = {
        "path": str(folder.resolve()),
        "revision": config.revision,
        "warnings": tuple(warnings),
        "continuation": read.state,
    }
    return Adapter(read.name, factors, content_hash=read.content_hash, base_model=config.base_model, metadata=metadata)


def hash_adapter(path: str | Path) -> str:
    """The content hash of the PEFT folder `path`, 64 hexadecimal digits, without building a tensor."""
    folder = Path(path)

    def feed(digest: "hashlib._Hash") -> None:
        chunk = bytearray(_CHUNK_BYTES)
        with (folder / WEIGHTS_FILE).open("rb", buffering=0) as file:
            while count := file.readinto(chunk):
                digest.update(memoryview(chunk)[:count])

    with _naming(folder.resolve().name):
        return _content_hash(_read_config(folder), feed, read_state(folder))


def read_shapes(path: str | Path, name: str | None = None) -> AdapterShapes:
    """What the PEFT folder `path` holds, checked but for the values: neither tensors nor their hash are read."""
    folder = Path(path)
    name = name if name is not None else folder.resolve().name
    with _naming(name):
        config = _read_config(folder)
        pairs, warnings = _checked_pairs(read_header(folder / WEIGHTS_FILE), config, folder)
        state = read_state(folder)
        size = (folder / WEIGHTS_FILE).stat().st_size
    entries = {module: (pair["A"].entry, pair["B"].entry) for module, pair in pairs.items()}
    shapes = {module: (b.shape[0], a.shape[1], a.shape[0]) for module, (a, b) in entries.items()}
    dtypes = sorted({factor.entry.dtype for pair in pairs.values() for factor in pair.values()})
    embeddings = frozenset(module for module, pair in pairs.items() if pair["A"].name.embedding)
    return AdapterShapes(config, shapes, tuple(dtypes), size, tuple(warnings), state.get("method"), embeddings)


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


def _read_weights(path: Path, memory: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The whole file in one buffer, which the tensors will be views of."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise UserInputError(
                f"{path}: {size:,} bytes; at most {MAX_FILE_BYTES:,} are read; this is no LoRA adapter"
            )
        data = memory(size)
        view, filled = data.numpy().data, 0
        while filled < size and (count := file.readinto(view[filled:])):
            filled += count
    if filled != size:
        raise UserInputError(f"{path}: ended after {filled:,} of {size:,} bytes; it changed while it was read")
    return data


def _content_hash(config: LoraConfig, feed: "Callable[[hashlib._Hash], None]", state: Mapping[str, object]) -> str:
    digest = hashlib.sha256(_HASH_DOMAIN + config.canonical() + b"\n")
    feed(digest)
    digest.update(canonical_state(state))
    return digest.hexdigest()


def _checked_pairs(entries: Mapping[str, TensorEntry], config: LoraConfig, folder: Path) -> tuple[_Pairs, list[str]]:
    """The A and B of every module, their shapes checked against each other and the configuration; and the warnings."""
    where = folder / WEIGHTS_FILE
    pairs: dict[str, dict[Part, _Factor]] = {}
    copies = {key for key in entries if key.endswith(BASE_COPY)}
    for key, entry in sorted(entries.items()):
        if key in copies:
            continue
        name = parse_name(key, where)
        pair = pairs.setdefault(name.module, {})
        if (other := pair.get(name.part)) is not None:
            raise UserInputError(
                f"{where}: module {name.module!r} has two {name.kind}, {shown(other.key)} and {shown(key)}; "
                "save one adapter per file"
            )
        pair[name.part] = _Factor(key, name, entry)
    if not pairs:
        raise UserInputError(f"{where}: no lora_A and lora_B tensors; this adapter changes nothing")
    ranks = config.ranks(pairs)
    for module, pair in pairs.items():
        _check_pair(module, pair, ranks[module], where)
    for key in copies:
        module = key.removeprefix(PREFIX).removesuffix(BASE_COPY)
        if module not in pairs:
            raise UserInputError(
                f"{where}: tensor {shown(key)} is a weight of a module without LoRA; {FULL_WEIGHT_HINT}"
            )
    ignored = [f"tensor {shown(key)} is a copy of a base weight and is ignored" for key in sorted(copies)]
    return pairs, ignored + config.warnings(pairs)


def _check_pair(module: str, pair: Mapping[Part, _Factor], expected: int, where: Path) -> None:
    kinds = sorted(factor.name.kind for factor in pair.values())
    embedding = next(iter(pair.values())).name.embedding
    wanted = [TensorName(module, "A", embedding).kind, TensorName(module, "B", embedding).kind]
    if kinds != wanted:
        missing = [kind for kind in wanted if kind not in kinds]
        found = f"{' and '.join(kinds)} but no {' and '.join(missing)}"
        raise UserInputError(f"{where}: module {module!r} has {found}; save the adapter again")
    shape_a, shape_b = pair["A"].entry.shape, pair["B"].entry.shape
    both = f"{wanted[0]} {list(shape_a)} and {wanted[1]} {list(shape_b)}"
    if len(shape_a) != 2 or len(shape_b) != 2:
        raise UserInputError(
            f"{where}: module {module!r} has {both}; only linear layers and embeddings, whose factors have two "
            "dimensions, can be merged"
        )
    if shape_a[0] != shape_b[1]:
        raise UserInputError(
            f"{where}: module {module!r}: {wanted[1]} {list(shape_b)} · {wanted[0]} {list(shape_a)} do not multiply; "
            f"expected {'(features, r) and (r, tokens)' if embedding else '(d_out, r) and (r, d_in)'}"
        )
    if 0 in shape_a + shape_b:
        raise UserInputError(
            f"{where}: module {module!r} has {both}; a rank of 0 or an "
            "empty factor usually means that sharded weights were not gathered before saving"
        )
    if shape_a[0] != expected:
        raise UserInputError(
            f"{where}: module {module!r} has rank {shape_a[0]} and {CONFIG_FILE} says {expected}; "
            "correct r or rank_pattern, on which the scaling depends"
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    # Many times quicker than isfinite over all entries, and without a temporary; NaN is passed on by both.
    least, most = torch.aminmax(tensor)
    return bool(torch.isfinite(least) and torch.isfinite(most))


def _tensors(
    data: torch.Tensor, pair: Mapping[Part, _Factor], module: str, folder: Path, check_values: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of a module, as views of the file's bytes."""
    tensors = {part: tensor_view(data, factor.entry) for part, factor in pair.items()}
    for part, tensor in tensors.items():
        if check_values and not _is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise UserInputError(
                f"{folder / WEIGHTS_FILE}: module {module!r}: {pair[part].name.kind} has {count} NaN or infinite values; "
                "train or save the adapter again"
            )
    return tensors["A"], tensors["B"]
