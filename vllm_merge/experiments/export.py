# SPDX-License-Identifier: Apache-2.0
"""The store's rows as files, for other tools: Parquet or CSV, a file for each table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, Protocol

from sqlalchemy import JSON, Boolean, Connection, Integer, String, Table, select

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.store import Store
from vllm_merge.experiments.tables import decisions, definitions, exposures, outcomes, pairs, units

Format = Literal["parquet", "csv"]
TABLES = (exposures, outcomes, pairs, units, decisions, definitions)
_ROWS_AT_ONCE = 20_000
_MISSING = (
    "pyarrow is not installed, and Parquet needs it; install it with `pip install 'vllm-merge[parquet]'`, or use csv"
)


class _File(Protocol):
    def write(self, rows: Sequence[Sequence[Any]]) -> None: ...

    def close(self) -> None: ...


def export(store: Store, folder: Path, form: Format, experiment: str | None = None) -> dict[Path, int]:
    """Write every table to `folder`, of one experiment or of all. Returns {file: rows}.

    A file appears when it is whole. Raises UserInputError (pyarrow is missing), StoreError.
    """
    opened = _parquet if form == "parquet" else _csv
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for table in TABLES:
        path = folder / f"{table.name}.{form}"
        beside = path.with_name(f".{path.name}.part")
        try:
            with store.reading() as connection, closing(opened(beside, table)) as file:
                count = 0
                for rows in _rows(connection, table, experiment):
                    file.write(rows)
                    count += len(rows)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        written[path] = count
    return written


def _rows(connection: Connection, table: Table, experiment: str | None) -> Iterator[list[tuple[Any, ...]]]:
    wanted = select(table).order_by(*table.primary_key)
    if experiment is not None:
        wanted = wanted.where(table.c.experiment == experiment)
    texts = [isinstance(column.type, JSON) for column in table.columns]
    for part in connection.execution_options(yield_per=_ROWS_AT_ONCE).execute(wanted).partitions():
        if any(texts):
            yield [tuple(json.dumps(v) if text else v for v, text in zip(row, texts, strict=True)) for row in part]
        else:
            yield [tuple(row) for row in part]


def _csv(path: Path, table: Table) -> _File:
    return _Csv(path, table)


class _Csv:
    def __init__(self, path: Path, table: Table) -> None:
        self._stream = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)
        self._writer.writerow(table.columns.keys())

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.writerows(rows)

    def close(self) -> None:
        self._stream.close()


def _parquet(path: Path, table: Table) -> _File:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserInputError(_MISSING) from None
    types = [(column.name, _arrow(pyarrow, column.type), column.nullable) for column in table.columns]
    schema = pyarrow.schema([pyarrow.field(name, kind, nullable) for name, kind, nullable in types])

    class Parquet:
        def __init__(self) -> None:
            self._writer = pyarrow.parquet.ParquetWriter(path, schema, compression="zstd")

        def write(self, rows: Sequence[Sequence[Any]]) -> None:
            columns = zip(*rows, strict=True)
            arrays = [pyarrow.array(v, type=f.type) for v, f in zip(columns, schema, strict=True)]
            self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))

        def close(self) -> None:
            self._writer.close()

    return Parquet()


def _arrow(pyarrow: Any, kind: Any) -> Any:
    """The Arrow type of a column."""
    if isinstance(kind, String | JSON):
        return pyarrow.string()
    if isinstance(kind, Boolean):
        return pyarrow.bool_()
    return pyarrow.int64() if isinstance(kind, Integer) else pyarrow.float64()
