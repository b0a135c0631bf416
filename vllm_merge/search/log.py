# SPDX-License-Identifier: Apache-2.0
"""The log of a search, a JSON object a line: what is searched, every candidate, every value; a search goes on from it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_merge.errors import UserInputError
from vllm_merge.search.candidates import Candidate

VERSION = 1


@dataclass
class Kept:
    """What a log says: candidates, their values in the order of the examples, and why others were dropped."""

    candidates: list[Candidate] = field(default_factory=list)
    values: dict[int, list[float]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Log:
    """Lines are appended, each written at once. path None: nothing is kept."""

    def __init__(self, path: Path | None, identity: Mapping[str, Any], *, resume: bool) -> None:
        """identity: what a search must have in common with the one it goes on from. Raises UserInputError."""
        self._file: Any = None
        self._lock = threading.Lock()
        self.kept = Kept()
        if path is None:
            return
        if resume:
            whole = self._read(path, json.loads(json.dumps(identity)))
            os.truncate(path, whole)  # a last line that was cut off is written again
        elif path.exists():
            raise UserInputError(f"--log {path}: is there already; give --resume to go on from it, or another file")
        self._file = path.open("a", encoding="utf-8")
        if not resume:
            self._write({"search": VERSION, "identity": identity})

    def add_candidates(
        self, candidates: Sequence[Candidate], failures: Mapping[int, str], notes: Sequence[str]
    ) -> None:
        """What is searched."""
        rows = [{"candidate": c.number, "recipe": dict(c.recipe), "size": c.size} for c in candidates]
        self._write({"candidates": rows, "failures": {str(k): v for k, v in failures.items()}, "notes": list(notes)})

    def add_values(self, number: int, start: int, values: Sequence[float]) -> None:
        """Values of a candidate from example `start` on."""
        self._write({"candidate": number, "from": start, "values": list(values)})

    def add_failure(self, number: int, reason: str) -> None:
        """A candidate is dropped."""
        self._write({"candidate": number, "failed": reason})

    def close(self) -> None:
        """Nothing is written any more."""
        if self._file is not None:
            self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        if self._file is not None:
            with self._lock:
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._file.flush()

    def _read(self, path: Path, identity: Mapping[str, Any]) -> int:
        """Take over what the file says; returns the bytes of its whole lines."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserInputError(f"--resume: {path}: cannot be read: {error.strerror}") from None
        whole = raw.rfind(b"\n") + 1
        for number, line in enumerate(raw[:whole].splitlines(), 1):
            try:
                self._take(json.loads(line), identity, number == 1, path)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserInputError(f"--resume: {path}:{number}: is no line of a search's log; begin anew") from None
        if not whole:
            raise UserInputError(f"--resume: {path}: is empty; begin anew, with another --log")
        return whole

    def _take(self, row: Mapping[str, Any], identity: Mapping[str, Any], first: bool, path: Path) -> None:
        kept = self.kept
        if first:
            before = row["identity"]
            differ = [f"{k} (it was {before.get(k)!r}, now {v!r})" for k, v in identity.items() if before.get(k) != v]
            if row["search"] != VERSION or differ:
                what = "; ".join(differ) or "it is of another version"
                raise UserInputError(
                    f"--resume: {path} is of another search: {what}; give the same again, or begin anew"
                )
        elif "candidates" in row:
            kept.candidates = [Candidate(r["candidate"], r["recipe"], r["size"]) for r in row["candidates"]]
            kept.failures = {int(k): str(v) for k, v in row["failures"].items()}
            kept.notes = list(row["notes"])
        elif "failed" in row:
            kept.failures[row["candidate"]] = row["failed"]
        else:
            values = kept.values.setdefault(row["candidate"], [])
            values[row["from"] :] = [float(value) for value in row["values"]]
