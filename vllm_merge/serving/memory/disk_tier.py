# SPDX-License-Identifier: Apache-2.0
"""Artifacts on disk (or wherever fsspec reaches), shared by replicas: a PEFT folder for each, named by its digest.

    ROOT/<digest>/adapter_config.json, adapter_model.safetensors     the adapter, for any PEFT program
    ROOT/<digest>/artifact.json                                      its name, and the SHA-256 of its tensors
    ROOT/<digest>/used                                               when it was last used, seconds since 1970
    ROOT/.merging/<digest>                                           who is merging it (reservations.py)

A local folder appears by one rename. Elsewhere artifact.json is written last, and what has none is not there. Whatever is
read is compared with the SHA-256; what differs is removed, so that it is merged anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from vllm_merge.adapters.factors import LoraFactors, factors_sha256
from vllm_merge.adapters.folders import new_folder
from vllm_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, write_adapter
from vllm_merge.adapters.tensor_file import MAX_FILE_BYTES, parse_header, tensor_view
from vllm_merge.adapters.tensor_names import parse_name
from vllm_merge.errors import MergeError
from vllm_merge.serving.memory.packed import Packed
from vllm_merge.serving.memory.reservations import Reservations

logger = logging.getLogger("vllm_merge.disk")

RECORD_FILE = "artifact.json"
USED_FILE = "used"
FORMAT = 1
ABANDONED_SECONDS = 3600  # a folder without a record that is older was left by a writer that ended

_DIGEST = re.compile(r"[0-9a-f]{64}")
_FOLDER = re.compile(r"\.?[0-9a-f]{64}(\.\w+)?")  # of an entry, or what a writer that ended has left of one
# NotImplementedError of a place that does not say when a file changed, ValueError of a torn `used`.
_UNTOLD = (OSError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Stored:
    """An artifact that was read and checked."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    tensors_sha256: str
    seconds: float
    embeddings: frozenset[str] = frozenset()
    report: Mapping[str, Any] | None = None

    def factors(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """{module: (A, B)} on the CPU."""
        return self.pairs


class _Damaged(Exception):
    """An entry is not what was written."""


class DiskTier:
    """Blocking calls, for a background thread; any number of processes may share a place."""

    def __init__(self, place: str, budget_bytes: int) -> None:
        """place: a folder, or an fsspec URL such as s3://bucket/merges."""
        self._fs, root = fsspec.core.url_to_fs(place)
        self._root = str(root).rstrip("/")
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))
        self.place, self.budget_bytes = place, budget_bytes
        self.bytes = 0  # as of the last write
        self.evicted = 0  # by this process
        self._fs.makedirs(self._root, exist_ok=True)

    def reservations(self, owner: str) -> Reservations:
        """Who merges what, among all that share the place."""
        return Reservations(self._fs, self._root, local=self._local, owner=owner)

    def holds(self, digest: str) -> bool:
        return _is_digest(digest) and bool(self._fs.exists(self._path(digest, RECORD_FILE)))

    def write(self, packed: Packed) -> bool:
        """Store an artifact, unless it is there; False if it is larger than the budget. Raises OSError."""
        if packed.nbytes > self.budget_bytes:
            return False
        if not _is_digest(packed.digest):
            raise ValueError(f"{packed.digest!r} is no digest")
        if not self.holds(packed.digest):
            factors = packed.lora_factors()
            record = {
                "format": FORMAT,
                "digest": packed.digest,
                "name": packed.name,
                "seconds": packed.seconds,
                "tensors_sha256": packed.tensors_sha256,
                "report": packed.report,
            }
            if self._local:
                self._write_local(packed.digest, factors, record)
            else:
                self._write_remote(packed.digest, factors, record)
        self.touch(packed.digest)
        self._trim(packed.digest)
        return True

    def read(self, digest: str) -> Stored | None:
        """The artifact if it is here and whole; a damaged one is removed. Raises OSError where the place fails."""
        if not _is_digest(digest):
            return None
        try:
            record = self._fs.cat_file(self._path(digest, RECORD_FILE))
            path = self._path(digest, WEIGHTS_FILE)
            weights = bytearray(min(int(self._fs.size(path)), MAX_FILE_BYTES))
            with self._fs.open(path, "rb") as file:
                view, filled = memoryview(weights), 0
                while filled < len(weights) and (count := file.readinto(view[filled:])):
                    filled += count
        except FileNotFoundError:
            if not self._fs.exists(self._path(digest, RECORD_FILE)):
                return None
            record, weights = b"", bytearray()
        try:
            stored = _checked(digest, record, weights)
        except _Damaged as damage:
            logger.error("%s/%s is damaged and is removed: %s", self.place, digest, damage)
            self.remove(digest)
            return None
        self.touch(digest)
        return stored

    def touch(self, digest: str) -> None:
        """Remember that an artifact is in use, where the place can: not if it is full, read-only, or has just removed it."""
        with contextlib.suppress(Exception):  # whatever a file system raises: the entry is what it was
            if self.holds(digest):
                self._fs.pipe_file(self._path(digest, USED_FILE), f"{time.time():.3f}".encode())

    def remove(self, digest: str) -> None:
        """The record goes first: from then on the entry is not there. Raises ValueError for what is no entry's name."""
        if not _FOLDER.fullmatch(digest):
            raise ValueError(f"{digest!r} is no digest")
        for path in (self._path(digest, RECORD_FILE), self._path(digest)):
            try:
                self._fs.rm(path, recursive=True)
            except FileNotFoundError:
                continue  # another replica was quicker

    def describe(self) -> dict[str, Any]:
        """For everybody who may ask the server: not where it is, which may be a URL with a password."""
        return {"bytes": self.bytes, "budget_bytes": self.budget_bytes, "evicted": self.evicted}

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _write_local(self, digest: str, factors: Mapping[str, LoraFactors], record: Mapping[str, Any]) -> None:
        try:
            with new_folder(Path(self._path(digest))) as folder:
                _write_folder(folder, factors, record)
        except (OSError, MergeError):
            if not self.holds(digest):  # else another worker has just written it
                raise

    def _write_remote(self, digest: str, factors: Mapping[str, LoraFactors], record: Mapping[str, Any]) -> None:
        temporary = Path(tempfile.mkdtemp(prefix="vllm-merge-"))
        try:
            _write_folder(temporary, factors, record)
            self._fs.makedirs(self._path(digest), exist_ok=True)
            for name in (CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE):
                self._fs.put_file(str(temporary / name), self._path(digest, name))
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _trim(self, newest: str) -> None:
        """Remove what was not used for longest until the rest fits, and what ended writers left."""
        sizes: defaultdict[str, int] = defaultdict(int)
        whole: set[str] = set()
        for path, info in self._fs.find(self._root, detail=True).items():
            folder, _, file = str(path)[len(self._root) :].lstrip("/").partition("/")
            sizes[folder] += int(info.get("size") or 0)
            if file == RECORD_FILE and _is_digest(folder):
                whole.add(folder)
        used = {folder: self._last_used(folder) for folder in whole - {newest}}
        total = sum(sizes.values())
        for folder in sorted(used, key=used.__getitem__):
            if total <= self.budget_bytes:
                break
            self.remove(folder)
            self.evicted += 1
            total -= sizes[folder]
        for folder in set(sizes) - whole:
            if _FOLDER.fullmatch(folder) and self._age(folder) > ABANDONED_SECONDS:
                self.remove(folder)
                total -= sizes[folder]
        self.bytes = total

    def _last_used(self, digest: str) -> float:
        path = self._path(digest, USED_FILE)
        try:
            text = self._fs.cat_file(path)
            return float(text) if text else float(self._fs.modified(path).timestamp())  # empty: the place was full
        except _UNTOLD:
            return 0.0

    def _age(self, folder: str) -> float:
        """Seconds since anything in a folder changed; 0 where the place does not tell."""
        try:
            files = self._fs.find(self._path(folder))
            return float(min(time.time() - self._fs.modified(path).timestamp() for path in files))
        except _UNTOLD:
            return 0.0


def _is_digest(name: str) -> bool:
    """Nothing else ever becomes part of a path."""
    return _DIGEST.fullmatch(name) is not None


def _write_folder(folder: Path, factors: Mapping[str, LoraFactors], record: Mapping[str, Any]) -> None:
    write_adapter(folder, factors, base_model=None)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _checked(digest: str, text: bytes, weights: bytearray) -> Stored:
    try:
        record = json.loads(text)
        if record["format"] != FORMAT or record["digest"] != digest:
            raise _Damaged(f"{RECORD_FILE} is of format {record['format']} and artifact {record['digest'][:12]}")
        pairs: dict[str, dict[str, Tensor]] = {}
        embeddings: set[str] = set()
        header = parse_header(weights, Path(WEIGHTS_FILE))
        data = torch.frombuffer(weights, dtype=torch.uint8)
        for key, entry in header.items():
            name = parse_name(key, Path(WEIGHTS_FILE))
            pairs.setdefault(name.module, {})[name.part] = tensor_view(data, entry)
            if name.embedding:
                embeddings.add(name.module)
        factors = {module: LoraFactors(pair["A"], pair["B"]) for module, pair in pairs.items()}
        found = factors_sha256(factors)
        if found != record["tensors_sha256"]:
            raise _Damaged(f"its tensors have the SHA-256 {found[:12]}, not {record['tensors_sha256'][:12]}")
        pairs_read = {module: (pair.A, pair.B) for module, pair in factors.items()}
        return Stored(pairs_read, found, float(record["seconds"]), frozenset(embeddings), record.get("report"))
    except (ValueError, KeyError, TypeError, AttributeError, MergeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from None
