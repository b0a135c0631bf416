# SPDX-License-Identifier: Apache-2.0
"""A hash of a base model that is cheap at any size.

For a folder: SHA-256 over config.json and, for each weight file in order of name, its name, its size, its safetensors
header and 64 KiB from each of evenly spaced places; all files together give 64 such samples, so that some 4 MiB beside
the headers are read whatever the model weighs. Two checkpoints of a model differ in nearly every weight, so samples
tell them apart; a change of single weights on purpose may go unseen. For a Hub name: of the snapshot folder in the
local cache; where there is none, of the name and the revision alone.
"""

import hashlib
import os
from pathlib import Path

from vllm_merge.adapters.hub import cached_snapshot

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".gguf"})  # read as bytes, never unpickled
SAMPLES = 64
SAMPLE_BYTES = 64 * 2**10
MAX_HEADER_BYTES = 4 * 2**20
_DOMAIN = b"vllm-merge base model 1\n"


def base_model_folder(path_or_name: str | Path, revision: str | None = None) -> Path | None:
    """Where the model is on this machine: the folder itself, or a Hub name's snapshot in the local cache; or None."""
    folder = Path(path_or_name).expanduser()
    return folder if folder.is_dir() else cached_snapshot(str(path_or_name), revision)


def base_model_hash(path_or_name: str | Path, revision: str | None = None) -> str:
    """The hash of a model folder or Hub name, 64 hexadecimal digits. See the module's text for what it covers."""
    folder = base_model_folder(path_or_name, revision)
    if folder is None:
        return hashlib.sha256(_DOMAIN + f"{path_or_name}\0{revision or ''}".encode()).hexdigest()
    digest = hashlib.sha256(_DOMAIN)
    config = folder / "config.json"
    _add(digest, config.read_bytes() if config.is_file() else b"")
    weights = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    for index, file in enumerate(weights):
        # The samples are dealt out evenly; every file gets at least its header.
        samples = SAMPLES * (index + 1) // len(weights) - SAMPLES * index // len(weights)
        _add_weights(digest, file, samples)
    return digest.hexdigest()


def _add_weights(digest: "hashlib._Hash", file: Path, samples: int) -> None:
    _add(digest, file.name.encode())
    with file.open("rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        _add(digest, str(size).encode())
        header = min(int.from_bytes(stream.read(8), "little"), MAX_HEADER_BYTES)
        _add(digest, stream.read(header))
        for index in range(samples):
            stream.seek(max(size - SAMPLE_BYTES, 0) * index // max(samples - 1, 1))
            _add(digest, stream.read(SAMPLE_BYTES))


def _add(digest: "hashlib._Hash", part: bytes) -> None:
    """Each part with its length, so that no two sequences of parts read alike."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
