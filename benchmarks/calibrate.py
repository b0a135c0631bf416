# SPDX-License-Identifier: Apache-2.0
"""Fit the constants that `vllm-merge plan` forecasts with to measured merges, and check them on points held out.

    python benchmarks/calibrate.py benchmarks/results/merge_speed.json benchmarks/results/merge_speed-cpu.json

Writes vllm_merge/forecast/calibration.json: an entry per device, in place of an earlier one of the same device. Rows of the
part `held_out` are not fitted; for each of them the forecast is printed beside the measured figures.
With --check nothing is fitted or written: what is shipped is checked.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import numpy as np
from shapes import shape_of

from vllm_merge import list_methods
from vllm_merge.forecast import cost
from vllm_merge.forecast.work import QUANTITIES, ModuleSize, case_key, quantities, works_in
from vllm_merge.methods.registry import MethodSpec

TARGET = Path(cost.__file__).with_name(cost.FILE)
ENOUGH = 4  # rows that a way to merge needs for constants of its own
SATURATED = 0.4 * 2**31  # bytes of workspace from which on its bound, 2 GiB, decides
SWEEPS = 20_000
Row = dict[str, Any]


def seconds_of(row: Row) -> float:
    """The fastest run: the median on a machine that is shared tells of the others, too."""
    return float(row["fastest"])


def modules_of(row: Row) -> list[ModuleSize]:
    shape = shape_of(row["shape"])
    ranks = (row["r"],) * row["n"]
    return [ModuleSize(d_out, d_in, ranks, row["rank"]) for _, d_out, d_in in shape.modules()]


def spec_of(row: Row) -> MethodSpec:
    return next(spec for spec in list_methods() if spec.name == row["method"])


def is_cut(row: Row) -> bool:
    return bool(row["rank"] < min(row["n"] * row["r"], shape_of(row["shape"]).largest_rank))


def space_of(row: Row) -> str:
    """The space whose quantities the merge is made of."""
    if row["asked_rank"] == "lossless":
        return str(row["space"])
    return works_in(spec_of(row), row["space"], row["parameters"], cut=is_cut(row))


def key_of(row: Row) -> str:
    space, defaults = space_of(row), spec_of(row).defaults(per_adapter=False)
    cut = space == "delta" or is_cut(row)
    return case_key(row["method"], space, cut=cut, parameters=row["parameters"], defaults=defaults)


def nonnegative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """x ≥ 0 that makes every rows[i] · x near values[i], relative to it, by coordinate descent."""
    scaled = rows / values[:, None]
    size = np.linalg.norm(scaled, axis=0)
    used = size > 0
    scaled = scaled[:, used] / size[used]
    x, rest = np.zeros(int(used.sum())), np.ones(len(values))
    for _ in range(SWEEPS):
        for column in range(len(x)):
            step = max(-x[column], scaled[:, column] @ rest)
            x[column] += step
            rest -= step * scaled[:, column]
    found = np.zeros(rows.shape[1])
    found[used] = x / size[used]
    return found


def fit(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """{way to merge: its constants}."""
    by_key: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["part"] in ("table", "growth"):
            by_key[key_of(row)].append(row)
    own = {key: _constants(mine) for key, mine in by_key.items() if len(mine) >= ENOUGH}
    others = {key: _as_a_relative(mine, own, by_key) for key, mine in by_key.items() if key not in own}
    return dict(sorted({**own, **{key: found for key, found in others.items() if found is not None}}.items()))


def _constants(rows: list[Row]) -> dict[str, Any]:
    names = list(QUANTITIES)
    work = np.array([[quantities(space_of(row), modules_of(row))[name] for name in names] for row in rows])
    seconds = nonnegative(work, np.array([seconds_of(row) for row in rows]))
    held = np.array([float(max(1, row["workspace_bytes"])) for row in rows])
    free = held < SATURATED
    workspace = nonnegative(work[free], held[free]) if free.any() else np.array([held.max()] + [0.0] * (len(names) - 1))
    limit = held.max() if not free.all() else 2.0**31
    return {"seconds": _named(seconds), "workspace": _named(workspace), "workspace_limit": float(f"{limit:.4g}")}


def _named(constants: np.ndarray) -> dict[str, float]:
    return {
        name: float(f"{value:.4g}") for name, value in zip(QUANTITIES, constants.tolist(), strict=True) if value > 0
    }


def _as_a_relative(
    rows: list[Row], own: dict[str, dict[str, Any]], by_key: dict[str, list[Row]]
) -> dict[str, Any] | None:
    """Too few rows: the constants of the way to merge in the same space whose times are most nearly proportional."""
    best: tuple[float, dict[str, Any]] | None = None
    for key, constants in own.items():
        if space_of(by_key[key][0]) != space_of(rows[0]):
            continue
        known = cost.Cost(**constants)
        even = {"call": 1.0, "bytes": 1.0, "operations": 1.0}
        predicted = [known.predict(space_of(row), modules_of(row), even) for row in rows]
        times = [seconds_of(row) / seconds for row, (seconds, _) in zip(rows, predicted, strict=True)]
        held = [max(1, row["workspace_bytes"]) / max(1.0, b) for row, (_, b) in zip(rows, predicted, strict=True)]
        spread = max(times) / min(times) + abs(math.log(geometric_mean(times)))
        if best is None or spread < best[0]:
            factor, more = geometric_mean(times), geometric_mean(held)
            best = (
                spread,
                {
                    "seconds": {name: float(f"{value * factor:.4g}") for name, value in constants["seconds"].items()},
                    "workspace": {name: float(f"{value * more:.4g}") for name, value in constants["workspace"].items()},
                    "workspace_limit": constants["workspace_limit"],
                },
            )
    return None if best is None else best[1]


def entry_of(content: dict[str, Any]) -> dict[str, Any]:
    """The entry of calibration.json for one file of results."""
    rates = content["rates"]
    return {
        "device": content["device"],
        "type": "cpu" if content["device"].startswith("CPU") else "cuda",
        "date": content["date"],
        "torch": content["torch"],
        "speed": {
            "bytes": rates["copy_bytes"],
            "operations": rates["float32_operations"],
            "call": rates["call_seconds"],
        },
        "costs": fit(content["rows"]),
    }


def check(content: dict[str, Any], calibration: cost.Calibration) -> tuple[int, int]:
    """Print forecast and measured figures of every held-out row; (how many are within a factor 2, how many there are)."""
    good = count = 0
    for row in content["rows"]:
        if row["part"] != "held_out":
            continue
        found = cost.DeviceCost(calibration, calibration.slower(None)).predict(
            key_of(row), space_of(row), modules_of(row)
        )
        if found is None:
            print(f"{row['case']:20} {row['shape']:>8} n={row['n']} r={row['r']}: no constants")
            count += 1
            continue
        seconds, workspace = found
        size = workspace + row["input_bytes"] + row["result_bytes"]
        times, more = seconds / seconds_of(row), size / row["peak_bytes"]
        within = all(0.5 <= ratio <= 2 for ratio in (times, more))
        good, count = good + within, count + 1
        print(
            f"{row['case']:20} {row['shape']:>8} n={row['n']:<2} r={row['r']:<2} "
            f"{1e3 * seconds:9.2f} ms forecast, {1e3 * seconds_of(row):9.2f} measured, x {times:5.2f}   "
            f"{size / 2**20:7.0f} MiB forecast, {row['peak_bytes'] / 2**20:7.0f} measured, x {more:5.2f}"
            f"{'' if within else '   OUTSIDE'}"
        )
    return good, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what merge_speed.py wrote")
    parser.add_argument("--check", action="store_true", help="check what is shipped; fit and write nothing")
    parser.add_argument("--out", type=Path, default=TARGET)
    options = parser.parse_args()
    before = json.loads(options.out.read_text())["devices"] if options.out.exists() else []
    entries = {entry["device"]: entry for entry in before}
    good = count = 0
    for path in options.results:
        content = json.loads(path.read_text())
        if not options.check:
            entries[content["device"]] = entry_of(content)
        calibration = cost.Calibration.from_dict(
            {key: entries[content["device"]][key] for key in ("device", "type", "speed", "costs")}
        )
        print(f"{content['device']}: {len(calibration.costs)} ways to merge")
        found = check(content, calibration)
        good, count = good + found[0], count + found[1]
    print(f"{good} of {count} held-out points within a factor 2")
    if not options.check:
        options.out.write_text(json.dumps({"devices": list(entries.values())}, indent=1) + "\n")
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
