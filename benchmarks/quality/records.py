# SPDX-License-Identifier: Apache-2.0
"""What was found, as JSON lines: one for the base on a task, for an adapter on its own, for a merge, for a learned one."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, Any]
RUN = "run.json"
WEIGHTS, BASE = "weights", "base"  # in run.json: the identity of each set and seed, and of the base
KEYS = {
    "base": ("weights", "task"),
    "single": ("weights", "set", "seed", "task"),
    "merge": ("set", "seed", "tasks", "method", "space", "rank"),
    "learned": ("set", "seed", "tasks", "method", "rank"),
}


def packed(bits: NDArray[np.bool_]) -> str:
    """Right or wrong for each example, as text."""
    return f"{len(bits)}:{base64.b85encode(np.packbits(bits).tobytes()).decode()}"


def unpacked(text: str) -> NDArray[np.bool_]:
    """What `packed` packed."""
    count, _, data = text.partition(":")
    return np.unpackbits(np.frombuffer(base64.b85decode(data), dtype=np.uint8), count=int(count)).astype(bool)


def key(row: Mapping[str, Any]) -> str:
    """What a row is the result of; of two with the same key the first one holds."""
    return json.dumps([row["kind"], *(row[name] for name in KEYS[row["kind"]])])


def read_rows(folder: Path) -> list[Row]:
    """All rows of all files, each key once. A last line that was cut off is left out, and so are rows of other weights than
    those that run.json names for their place."""
    weights = read_run(folder).get(WEIGHTS, {})
    found: dict[str, Row] = {}
    for path in sorted(folder.glob("rows*.jsonl")):
        for row in _lines(path):
            mine = row.get("weights")
            if weights.get(place_of(row["set"], row["seed"]) if "set" in row else BASE, mine) == mine:
                found.setdefault(key(row), row)
    return list(found.values())


def place_of(kind: str, seed: int) -> str:
    """The adapters of a set and seed in run.json's `weights`, and under `adapters`."""
    return f"{kind}/{seed}"


def begin_anew(folder: Path) -> None:
    """Forget all rows and what run.json says, but for how the base was trained."""
    for path in folder.glob("rows*.jsonl"):
        path.unlink()
    content = read_run(folder)
    write_run(folder, {name: content[name] for name in ("settings", "device", "versions", BASE) if name in content})


def _lines(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class Writer:
    """Appends rows to one file; each is on disk when `add` returns."""

    def __init__(self, folder: Path, name: str = "rows") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.jsonl"
        cut = path.is_file() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self._file = path.open("a", encoding="utf-8")
        if cut:
            self._file.write("\n")

    def add(self, row: Row) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()


def read_run(folder: Path) -> dict[str, Any]:
    """Settings, machine, training records and the tasks that count; empty before the first run."""
    path = folder / RUN
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{RUN}.part"
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(folder / RUN)


def identity(weights: Path, place: str | None = None) -> str:
    """Of the base, and the adapters of a set and seed: 12 hexadecimal digits."""
    digest = hashlib.sha256((weights / "base" / "model.safetensors").read_bytes())
    adapters = sorted((weights / "adapters" / place).glob("*/adapter_model.safetensors")) if place else []
    for path in adapters:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
