# SPDX-License-Identifier: Apache-2.0
"""The tables of the store, alike in SQLite and PostgreSQL.

Rows that are written once: exposures, outcomes, pairs, definitions, decisions. Sums that are kept up to date with the exposures, in
the same transaction: `units` (one row for each unit, so that statistics need no pass over exposures) and `histograms` (of
latencies, by arm).
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

SCHEMA_VERSION = 2  # every version so far has added tables and changed none: `database` makes what is missing
LATENCIES = ("first_token", "gap", "seconds")  # measures that have a histogram; gap: the mean one of a stream

metadata = MetaData()

about = Table("vllm_merge_store", metadata, Column("schema_version", Integer, nullable=False))


def _text(name: str, *, primary_key: bool = False) -> Column[str]:
    return Column(name, String, nullable=False, primary_key=primary_key)


def _number(name: str, *, nullable: bool = False) -> Column[float]:
    return Column(name, Double, nullable=nullable)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False)


exposures = Table(
    "exposures",
    metadata,
    _text("id", primary_key=True),
    _number("at"),
    _text("experiment"),
    Column("version", Integer, nullable=False),
    *(_text(name) for name in ("arm", "artifact", "reason", "unit", "unit_kind")),
    Column("status", Integer, nullable=False),
    _text("error"),
    _text("finish"),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    *(_number(name, nullable=True) for name in ("first_token", "gap_mean", "gap_p99", "gap_max")),
    _number("seconds"),
    Column("streaming", Boolean, nullable=False),
    Column("refused", Boolean, nullable=False),
    Index("exposures_by_time", "at"),
)

# An outcome lies beside those of the same arm and unit, so that they are added up in one pass. arm: "" where it is not known.
outcomes = Table(
    "outcomes",
    metadata,
    _text("experiment", primary_key=True),
    _text("metric", primary_key=True),
    _text("arm", primary_key=True),
    _text("unit", primary_key=True),
    _text("id", primary_key=True),
    _number("at"),
    _number("value"),
    *(_text(name) for name in ("label", "exposure")),
    Column("version", Integer, nullable=False),
    Column("counted", Boolean, nullable=False),
    UniqueConstraint("id"),
    Index("outcomes_by_time", "at"),
    sqlite_with_rowid=False,
)

# unit: the cluster, which is the exposure's id where every request is its own unit. requests: all of them; answers and
# tokens: those whose length is known; *_n, *_sum and *_log: how many latencies were measured, their sum, and that of their
# logarithms. version: the first of its phase (phases.py). A row lies where its arm is, so that an arm is summed up in one pass.
units = Table(
    "units",
    metadata,
    _text("experiment", primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    _text("arm", primary_key=True),
    _text("unit", primary_key=True),
    _number("first_at"),
    _number("last_at"),
    *(_count(name) for name in ("requests", "errors", "refusals", "answers", "tokens")),
    *(column for name in LATENCIES for column in (_count(f"{name}_n"), _number(f"{name}_sum"), _number(f"{name}_log"))),
    Index("units_by_unit", "experiment", "unit"),
    Index("units_by_time", "last_at"),
    sqlite_with_rowid=False,
)

histograms = Table(
    "histograms",
    metadata,
    _text("experiment", primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    _text("arm", primary_key=True),
    _text("measure", primary_key=True),
    Column("bin", Integer, primary_key=True, autoincrement=False),
    _count("count"),
)

# A request that a second arm answered, or was to answer (pairs.py).
pairs = Table(
    "pairs",
    metadata,
    _text("experiment", primary_key=True),
    _text("exposure", primary_key=True),
    _text("shadow", primary_key=True),
    _number("at"),
    Column("version", Integer, nullable=False),
    *(_text(name) for name in ("arm", "outcome", "unit")),
    Column("streaming", Boolean, nullable=False),
    *(Column(name, Integer) for name in ("tokens", "shadow_tokens", "positions")),
    Column("equal", Boolean),
    *(_number(name, nullable=True) for name in ("agreement", "kl", "missing", "shadow_missing", "preferred")),
    *(_number(name, nullable=True) for name in ("seconds", "shadow_seconds", "first_token", "shadow_first_token")),
    Index("pairs_by_time", "at"),
    sqlite_with_rowid=False,
)

definitions = Table(
    "definitions",
    metadata,
    _text("experiment", primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    _number("at"),
    Column("document", JSON, nullable=False),
)

# once: what makes a decision the same as another (of two replicas that see one breach, the first decides); NULL: it is never.
decisions = Table(
    "decisions",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    _text("experiment"),
    Column("version", Integer, nullable=False),
    _text("kind"),
    _number("at"),
    *(_text(name) for name in ("arm", "guardrail", "reason")),
    Column("once", String),
    UniqueConstraint("once"),
    Index("decisions_by_experiment", "experiment"),
)
