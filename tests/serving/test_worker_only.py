# SPDX-License-Identifier: Apache-2.0
"""The merge happens in the worker: the merged tensors are in its memory and in no other process of the server."""

import re
from pathlib import Path

import pytest

from tests.conftest import processes_of
from tests.serving.test_exactness import exported  # noqa: F401  (a fixture)
from tests.serving.test_routes import MERGES

CHUNK = 1 << 24


def occurrences(pid: int, pattern: bytes) -> tuple[int, int]:
    """How often these bytes stand in a process's writable memory, and how many bytes of it were read."""
    found = read = 0
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            bounds, rights = re.match(r"([0-9a-f]+-[0-9a-f]+) (\S+)", line).groups()
            if not rights.startswith("rw"):
                continue
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            while start < end:
                try:
                    memory.seek(start)
                    data = memory.read(min(CHUNK, end - start) + len(pattern) - 1)
                except PermissionError:
                    pytest.skip("another process's memory may not be read here")
                except OSError:
                    break  # a mapping of a device
                found += data.count(pattern)
                read += len(data)
                start += CHUNK
    return found, read


def test_merged_tensors_are_in_the_worker_alone(demo_server, client, exported, prompts):  # noqa: F811
    from safetensors import safe_open

    client.completions.create(model=MERGES[0], prompt=prompts[0]["prompt"], max_tokens=1)
    with safe_open(Path(exported[MERGES[0]]) / "adapter_model.safetensors", "np") as file:
        name = next(key for key in sorted(file.keys()) if ".lora_A." in key)
        row = file.get_tensor(name)[0]
    pattern = row.tobytes()[:256]
    assert len(set(row[:64].tolist())) > 32, "bytes that occur by chance nowhere"
    worker = processes_of(demo_server)["worker"]
    assert occurrences(worker, pattern)[0] >= 1
    others = family_of(demo_server.process.pid) - {worker}
    assert demo_server.process.pid in others
    for pid in others:
        found, read = occurrences(pid, pattern)
        assert found == 0, f"process {pid} has merged tensors"
        assert read > 10_000_000, f"the memory of process {pid} was read"


def family_of(pid: int) -> set[int]:
    """A server's processes: this one and those it started, without helpers that hold nothing."""
    found, parents = {pid}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                size = int((entry / "statm").read_text().split()[1]) * 4096
            except OSError:
                continue
            if size > 100_000_000:
                parents[int(entry.name)] = int(fields[1])
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found
