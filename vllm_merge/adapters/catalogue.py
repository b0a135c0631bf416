# SPDX-License-Identifier: Apache-2.0
"""The registered adapters by name: where they are, what they hold, and the hash of their content."""

import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_merge.adapters.hub import adapter_folder
from vllm_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, hash_adapter, read_shapes
from vllm_merge.adapters.sequence_state import REPORT_FILE
from vllm_merge.errors import UserInputError

# What tells that a file was replaced or written to: path, inode, size and time of the last change.
_Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter holds. ranks: {rank: number of modules}; size_bytes: of the safetensors file; dtypes as in it."""

    base_model: str | None
    modules: int
    ranks: Mapping[int, int]
    parameters: int
    size_bytes: int
    dtypes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    def to_dict(self) -> dict[str, object]:
        """The summary as plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RegisteredAdapter:
    """An adapter of the catalogue; `shapes` is {module: (d_out, d_in, rank)}. continues: the sequential method that can
    go on from it, if one made it. embeddings: which of the modules are embeddings. base_revision: of the base model that it
    was trained on, where its configuration says so."""

    name: str
    path: Path
    summary: AdapterSummary
    shapes: Mapping[str, tuple[int, int, int]]
    continues: str | None = None
    embeddings: frozenset[str] = frozenset()
    base_revision: str | None = None


class Catalogue:
    """Registered adapters. Safe to use from several threads."""

    def __init__(self) -> None:
        self._adapters: dict[str, RegisteredAdapter] = {}
        self._hashes: dict[_Stamp, str] = {}
        self._lock = threading.Lock()

    def register(self, name: str, path: str | Path, revision: str | None = None) -> RegisteredAdapter:
        """Register the PEFT folder or Hub repository `path` as `name`, replacing what had that name.

        Raises UserInputError where it is not an adapter that can be merged; the catalogue is then as it was.
        """
        try:
            folder = adapter_folder(str(path), revision)
        except UserInputError as error:
            raise UserInputError(f"adapter {name!r}: {error}") from None
        found = read_shapes(folder, name)
        ranks: dict[int, int] = {}
        for _, _, rank in sorted(found.modules.values(), key=lambda shape: shape[2]):
            ranks[rank] = ranks.get(rank, 0) + 1
        summary = AdapterSummary(
            base_model=found.config.base_model,
            modules=len(found.modules),
            ranks=ranks,
            parameters=sum((d_out + d_in) * rank for d_out, d_in, rank in found.modules.values()),
            size_bytes=found.size_bytes,
            dtypes=found.dtypes,
            warnings=found.warnings,
        )
        adapter = RegisteredAdapter(
            name, folder, summary, found.modules, found.continues, found.embeddings, found.config.revision
        )
        with self._lock:
            self._adapters[name] = adapter
        return adapter

    def names(self) -> list[str]:
        """The registered names, sorted."""
        with self._lock:
            return sorted(self._adapters)

    def get(self, name: str) -> RegisteredAdapter:
        """The adapter registered as `name`. Raises UserInputError where there is none."""
        with self._lock:
            if name not in self._adapters:
                known = ", ".join(sorted(self._adapters)) or "none"
                raise UserInputError(f"no registered adapter {name!r} (known: {known})")
            return self._adapters[name]

    def paths(self) -> dict[str, Path]:
        """The folder of every registered adapter."""
        with self._lock:
            return {name: adapter.path for name, adapter in self._adapters.items()}

    def content_hash(self, name: str) -> str:
        """The content hash of the adapter `name` as its files are now; computed again only where they changed."""
        folder = self.get(name).path
        stamp = _stamp(folder)
        with self._lock:
            known = self._hashes.get(stamp)
        if known is not None:
            return known
        computed = hash_adapter(folder)
        if _stamp(folder) != stamp:
            raise UserInputError(f"adapter {name!r}: {folder} changed while it was read; try again when it is written")
        with self._lock:
            self._hashes[stamp] = computed
        return computed


def _stamp(folder: Path) -> _Stamp:
    parts = []
    for file in (folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder / REPORT_FILE):
        try:
            status = file.stat()
        except OSError as error:
            if file.name == REPORT_FILE:
                continue
            raise UserInputError(f"{file}: cannot be read: {error.strerror}") from None
        parts.append((str(file), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(parts)
