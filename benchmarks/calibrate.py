# SPDX-License-Identifier: Apache-2.0
"""Fit the constants that `vllm-merge plan` forecasts with to measured merges, and check them on points they do not know.

    python benchmarks/calibrate.py benchmarks/results/merge_speed.json benchmarks/results/merge_speed-cpu.json

Writes vllm_merge/forecast/calibration.json: an entry per device, of all files of that device, in place of an earlier one.
What is shipped knows every row. How well it foretells what was not measured is told by leaving out each point (shape, n, r)
in turn: constants are fitted to the other points, and forecast and measured figures of this one printed side by side.
With --check nothing is written: the forecasts are those of what is shipped, for the rows it was fitted to and for others.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from scipy.optimize import nnls
from shapes import shape_of

from vllm_merge import list_methods
from vllm_merge.forecast import cost
from vllm_merge.forecast.work import QUANTITIES, ModuleSize, case_key, quantities, works_in
from vllm_merge.methods.registry import MethodSpec

TARGET = Path(cost.__file__).with_name(cost.FILE)
PARTS = ("table", "growth", "held_out")
ENOUGH = 4  # points that a way to merge needs for constants of its own
SATURATED = 0.5  # of the bound: from this share of it on, the bound decides how much workspace there is
# A GPU's Gram matrices take a fiftieth of a merge, and five points cannot tell them from `stacked`.
NOT_FITTED: dict[str, tuple[str, ...]] = {"cuda": ("grams",), "cpu": ()}
EVEN = {"call": 1.0, "bytes": 1.0, "operations": 1.0}
Row = dict[str, Any]
Point = tuple[str, int, int]


def type_of(content: dict[str, Any]) -> str:
    return "cpu" if content["device"].startswith("CPU") else "cuda"


def rows_of(content: dict[str, Any]) -> list[Row]:
    """The rows that count, each with what holds for all of its file: the device, the bound of the workspace, the oversampling."""
    common = {"type": type_of(content), **{name: content[name] for name in ("workspace_bound", "oversampling")}}
    return [{**common, **row} for row in content["rows"] if row["part"] in PARTS]


def seconds_of(row: Row) -> float:
    """The fastest run, or how long one thread worked: the median on a machine that is shared tells of the others, too."""
    return float(row.get("busy_seconds") or row["fastest"])


def point_of(row: Row) -> Point:
    return row["shape"], row["n"], row["r"]


def modules_of(row: Row) -> list[ModuleSize]:
    shape = shape_of(row["shape"])
    ranks = (row["r"],) * row["n"]
    return [ModuleSize(d_out, d_in, ranks, row["rank"]) for _, d_out, d_in in shape.modules()]


def spec_of(row: Row) -> MethodSpec:
    return next(spec for spec in list_methods() if spec.name == row["method"])


def is_cut(row: Row) -> bool:
    """Whether the rank asked for is less than what the rule makes; a rule that makes less than n · r cuts nothing."""
    return isinstance(row["asked_rank"], int) and bool(
        row["rank"] < min(row["n"] * row["r"], shape_of(row["shape"]).largest_rank)
    )


def space_of(row: Row) -> str:
    """The space whose quantities the merge is made of."""
    if row["asked_rank"] == "lossless":
        return str(row["space"])
    return works_in(spec_of(row), row["space"], row["parameters"], cut=is_cut(row))


def takes_spectra(row: Row) -> bool:
    """Whether the merge needs eigenvalues: not one that in `core` only weighs adapters, or gives columns other lengths."""
    spec = spec_of(row)
    light = spec.coefficients is not None or spec.scales_columns(row["parameters"])
    return not (light and space_of(row) == "core")


def key_of(row: Row) -> str:
    space, defaults = space_of(row), spec_of(row).defaults(per_adapter=False)
    cut = row["asked_rank"] != "lossless" if space == "delta" else is_cut(row)
    return case_key(row["method"], space, cut=cut, parameters=row["parameters"], defaults=defaults)


def work_of(row: Row) -> dict[str, float]:
    """The quantities of a row, with the range finder of its day."""
    return quantities(space_of(row), modules_of(row), row["oversampling"])


def nonnegative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """x ≥ 0 that makes every rows[i] · x near values[i], relative to it, by least squares."""
    scaled = rows / values[:, None]
    size = np.linalg.norm(scaled, axis=0)
    size[size == 0] = 1.0
    found: np.ndarray = nnls(scaled / size, np.ones(len(values)))[0] / size
    return found


def fit(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """{way to merge: its constants}."""
    by_key: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_key[key_of(row)].append(row)
    own = {key: _constants(mine) for key, mine in by_key.items() if len({point_of(row) for row in mine}) >= ENOUGH}
    others = {key: _as_a_relative(mine, own, by_key) for key, mine in by_key.items() if key not in own}
    return dict(sorted({**own, **{key: found for key, found in others.items() if found is not None}}.items()))


def _constants(rows: list[Row]) -> dict[str, Any]:
    every = [work_of(row) for row in rows]
    names = [name for name in QUANTITIES if name not in NOT_FITTED[rows[0]["type"]]]
    work = np.array([[one[name] for name in names] for one in every])
    dense = space_of(rows[0]) == "delta"  # where entries take all the time, and a tile is held however few they are
    timed = work * [not dense or name != "fixed" for name in names]
    seconds = nonnegative(timed, np.array([seconds_of(row) for row in rows]))
    held = np.array([float(max(1, row["workspace_bytes"])) for row in rows])
    share = held / np.array([float(row["workspace_bound"]) for row in rows])
    free = share < SATURATED
    workspace = nonnegative(work[free], held[free]) if free.any() else np.zeros(len(names))
    return {
        "seconds": _named(dict(zip(names, seconds, strict=True))),
        "workspace": _named(dict(zip(names, workspace, strict=True))),
        "workspace_share": _rounded(max(share.max(), SATURATED)),
    }


def _named(constants: dict[str, Any]) -> dict[str, float]:
    return {name: _rounded(value) for name, value in constants.items() if value > 0}


def _rounded(value: Any) -> float:
    return float(f"{value:.4g}")


def _as_a_relative(
    rows: list[Row], own: dict[str, dict[str, Any]], by_key: dict[str, list[Row]]
) -> dict[str, Any] | None:
    """Too few points: the constants of the way to merge in the same space whose times are most nearly proportional.

    One that needs eigenvalues is no relative of one that does not: their times grow apart where matrices become large.
    """
    best: tuple[float, dict[str, Any]] | None = None
    for key, constants in own.items():
        near = by_key[key][0]
        if space_of(near) != space_of(rows[0]) or takes_spectra(near) != takes_spectra(rows[0]):
            continue
        known = cost.Cost(**constants)
        predicted = [known.of_work(work_of(row), EVEN, row["workspace_bound"]) for row in rows]
        times = [seconds_of(row) / seconds for row, (seconds, _) in zip(rows, predicted, strict=True)]
        held = [max(1, row["workspace_bytes"]) / max(1.0, b) for row, (_, b) in zip(rows, predicted, strict=True)]
        if max(times) / min(times) > 4:  # it would miss even these points by more than a factor 2
            continue
        spread = max(times) / min(times) + abs(math.log(geometric_mean(times)))
        if best is None or spread < best[0]:
            factor, more = geometric_mean(times), geometric_mean(held)
            share = max(row["workspace_bytes"] / row["workspace_bound"] for row in rows)
            best = (
                spread,
                {
                    "seconds": _named({name: value * factor for name, value in constants["seconds"].items()}),
                    "workspace": _named({name: value * more for name, value in constants["workspace"].items()}),
                    "workspace_share": _rounded(max(share, constants["workspace_share"])),
                },
            )
    return None if best is None else best[1]


def entry_of(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry of calibration.json for the files of one device. Rates are those of the last."""
    last = contents[-1]
    rates = last["rates"]
    return {
        "device": last["device"],
        "type": type_of(last),
        "date": last["date"],
        "torch": last["torch"],
        "speed": {
            "bytes": rates["copy_bytes"],
            "operations": rates["float32_operations"],
            "call": rates["call_seconds"],
        },
        "costs": fit([row for content in contents for row in rows_of(content)]),
    }


@dataclass(frozen=True, slots=True)
class Foretold:
    """A row, and forecast over measured of its seconds and its peak bytes; None where its way to merge has no constants."""

    row: Row
    seconds: float | None
    bytes: float | None

    def within(self, factor: float) -> bool:
        return all(r is not None and 1 / factor <= r <= factor for r in (self.seconds, self.bytes))

    def in_words(self) -> str:
        row = self.row
        what = f"{row['case']:20} {row['shape']:>8} n={row['n']:<2} r={row['r']:<2}"
        if self.seconds is None or self.bytes is None:
            return f"{what} no forecast: measured at no other point"
        measured, peak = 1e3 * seconds_of(row), row["peak_bytes"] / 2**20
        return (
            f"{what} {measured * self.seconds:9.2f} ms forecast, {measured:9.2f} measured, x {self.seconds:5.2f}   "
            f"{peak * self.bytes:7.0f} MiB forecast, {peak:7.0f} measured, x {self.bytes:5.2f}"
            f"{'' if self.within(2) else '   OUTSIDE'}"
        )


def foretold(rows: Sequence[Row], costs: dict[str, dict[str, Any]]) -> Iterator[Foretold]:
    """What these constants say of rows of their device."""
    for row in rows:
        constants = costs.get(key_of(row))
        if constants is None:
            yield Foretold(row, None, None)
            continue
        seconds, workspace = cost.Cost(**constants).of_work(work_of(row), EVEN, row["workspace_bound"])
        size = workspace + row["input_bytes"] + row["result_bytes"]
        yield Foretold(row, seconds / seconds_of(row), size / row["peak_bytes"])


def each_point_left_out(rows: Sequence[Row]) -> Iterator[Foretold]:
    """Every row, foretold from the rows of all other points."""
    for point in dict.fromkeys(point_of(row) for row in rows):
        costs = fit([row for row in rows if point_of(row) != point])
        yield from foretold([row for row in rows if point_of(row) == point], costs)


def summary(found: Sequence[Foretold]) -> str:
    known = [one for one in found if one.seconds is not None]
    text = f"{sum(one.within(2) for one in known)} of {len(known)} rows within a factor 2"
    return text + (f"; {len(found) - len(known)} have no forecast" if len(known) < len(found) else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what merge_speed.py wrote")
    parser.add_argument("--check", action="store_true", help="check what is shipped; fit and write nothing")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    before = json.loads(options.out.read_text())["devices"] if options.out.exists() else []
    entries = {entry["device"]: entry for entry in before}
    by_device: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in options.results:
        content = json.loads(path.read_text())
        if lacking := {"workspace_bound", "oversampling"} - content.keys():
            parser.error(f"{path} has no {' and no '.join(sorted(lacking))}: measure again with merge_speed.py")
        by_device[content["device"]].append(content)
    for device, contents in by_device.items():
        rows = [row for content in contents for row in rows_of(content)]
        if options.check and device not in entries:
            print(f"{device}: skipped, {options.out.name} knows {', '.join(entries) or 'no device'}")
            continue
        entry = entries[device] if options.check else entry_of(contents)
        if not entry["costs"]:
            print(f"{device}: skipped, no way to merge was measured at {ENOUGH} points")
            continue
        entries[device], costs = entry, entry["costs"]
        print(f"{device}: {len(costs)} ways to merge")
        found = list(foretold(rows, costs) if options.check else each_point_left_out(rows))
        for one in found:
            print(one.in_words())
        print(f"{device}, {'as shipped' if options.check else 'each point left out'}: {summary(found)}")
    if not options.check:
        options.out.write_text(json.dumps({"devices": list(entries.values())}, indent=1) + "\n")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
