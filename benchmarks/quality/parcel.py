# SPDX-License-Identifier: Apache-2.0
"""Weights of a run as a few small files, for another machine: the very bytes that were measured.

python -m benchmarks.quality.parcel pack base DIR              # the base model
python -m benchmarks.quality.parcel pack plain/0 osrm/1 DIR    # the adapters of a set and seed
python -m benchmarks.quality.parcel pack starts DIR            # where the OSRM adapters start
python -m benchmarks.quality.parcel unpack DIR                 # what lies in DIR, under build/quality/full
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

from benchmarks.quality.settings import ADAPTER_SETS

PART_BYTES = 15_000_000
WHOLE = ("base", "starts")


def place_in(weights: Path, what: str) -> Path:
    """The folder of one thing. Raises SystemExit for another name than those above."""
    if what in WHOLE:
        return weights / what
    kind, _, seed = what.partition("/")
    if kind not in ADAPTER_SETS or not seed.isdecimal():
        raise SystemExit(
            f"{what}: allowed are {', '.join(WHOLE)}, and SET/SEED with a set of {', '.join(ADAPTER_SETS)}"
        )
    return weights / "adapters" / kind / seed


def pack(weights: Path, what: str, folder: Path) -> list[Path]:
    """Write the parts of one thing, each of PART_BYTES at most; their paths."""
    place = place_in(weights, what)
    if not place.is_dir():
        raise SystemExit(f"{place}: is not there; run benchmarks.quality.run first")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            data = path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(weights)))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    data = archive.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, start in enumerate(range(0, len(data), PART_BYTES)):
        written.append(folder / f"{what.replace('/', '-')}.tar.{index:02}")
        written[-1].write_bytes(data[start : start + PART_BYTES])
    return written


def unpack(folder: Path, weights: Path) -> list[str]:
    """Put together what the folder has parts of; what was found. What is there already is left alone."""
    found = [_named(path.name.removesuffix(".tar.00")) for path in sorted(folder.glob("*.tar.00"))]
    if not found:
        raise SystemExit(f"{folder}: has no parts, files such as base.tar.00")
    for what in found:
        place = place_in(weights, what)
        if place.exists():
            raise SystemExit(f"{place}: is there already; remove it, or give another --weights")
        data = b"".join(part.read_bytes() for part in sorted(folder.glob(f"{what.replace('/', '-')}.tar.*")))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(weights, filter="data")
    return found


def _named(file: str) -> str:
    """plain/0 of plain-0, and base of base."""
    kind, _, seed = file.rpartition("-")
    return f"{kind}/{seed}" if kind else file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    full = Path(__file__).resolve().parents[2] / "build" / "quality" / "full"
    parser.add_argument("--weights", type=Path, default=full, help="base and adapters (build/quality/full)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing, unpacking = verbs.add_parser("pack"), verbs.add_parser("unpack")
    packing.add_argument("what", nargs="+", help="base, starts, or a set and seed such as plain/0")
    for verb in (packing, unpacking):
        verb.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.verb == "pack":
        for what in args.what:
            for path in pack(args.weights, what, args.folder):
                print(f"{path}: {path.stat().st_size:,} bytes")
    else:
        print(f"{', '.join(unpack(args.folder, args.weights))} in {args.weights}")


if __name__ == "__main__":
    main()
