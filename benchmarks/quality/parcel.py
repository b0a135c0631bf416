# SPDX-License-Identifier: Apache-2.0
"""Weights of a run as a few small files, in bfloat16, for another machine.

    python -m benchmarks.quality.parcel pack base DIR          # the base model
    python -m benchmarks.quality.parcel pack adapters DIR      # the plain adapters of seed 0
    python -m benchmarks.quality.parcel unpack DIR             # what lies in DIR, under build/quality/full

Rounded to bfloat16 they are not the very weights that were measured: `served` says so, and compares all the same.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

PART_BYTES = 15_000_000
WHAT = {"base": "base", "adapters": "adapters/plain/0"}


def pack(weights: Path, what: str, folder: Path) -> list[Path]:
    """Write the parts of one thing, each of PART_BYTES at most; their paths."""
    place = weights / WHAT[what]
    if not place.is_dir():
        raise SystemExit(f"{place}: is not there; run benchmarks.quality.run first")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted(path for path in place.rglob("*") if path.is_file()):
            data = _small(path) if path.suffix == ".safetensors" else path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(weights)))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    data = archive.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, start in enumerate(range(0, len(data), PART_BYTES)):
        written.append(folder / f"{what}.tar.{index:02}")
        written[-1].write_bytes(data[start : start + PART_BYTES])
    return written


def _small(path: Path) -> bytes:
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    return save(tensors, metadata={"format": "pt"})


def unpack(folder: Path, weights: Path) -> list[str]:
    """Put together what the folder has parts of; what was found. What is there already is left alone."""
    found = [what for what in WHAT if (folder / f"{what}.tar.00").is_file()]
    if not found:
        raise SystemExit(f"{folder}: has no parts, files such as base.tar.00")
    for what in found:
        if (weights / WHAT[what]).exists():
            raise SystemExit(f"{weights / WHAT[what]}: is there already; remove it, or give another --weights")
        data = b"".join(part.read_bytes() for part in sorted(folder.glob(f"{what}.tar.*")))
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(weights, filter="data")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    full = Path(__file__).resolve().parents[2] / "build" / "quality" / "full"
    parser.add_argument("--weights", type=Path, default=full, help="base and adapters (build/quality/full)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing, unpacking = verbs.add_parser("pack"), verbs.add_parser("unpack")
    packing.add_argument("what", choices=WHAT)
    for verb in (packing, unpacking):
        verb.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.verb == "pack":
        for path in pack(args.weights, args.what, args.folder):
            print(f"{path}: {path.stat().st_size:,} bytes")
    else:
        print(f"{', '.join(unpack(args.folder, args.weights))} in {args.weights}")


if __name__ == "__main__":
    main()
