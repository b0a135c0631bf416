# SPDX-License-Identifier: Apache-2.0
"""The merge happens in the worker: the merged tensors are in its memory and in no other process of the server."""

import re
from pathlib import Path

import pytest

from tests.conftest import processes_of
from tests.serving.test_exactness import exported  # noqa: F401  (a fixture)
from tests.serving.test_routes import MERGES

CHUNK = 1 << 24


def occurrences(pid: int, pattern: bytes) -> int:
    """How often these bytes stand in a process's private, writable memory."""
    found = 0
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
                except OSError:
                    break
                found += data.count(pattern)
                start += CHUNK
    return found


def test_merged_tensors_are_in_the_worker_alone(demo_server, client, exported, prompts):  # noqa: F811
    from safetensors import safe_open

    client.completions.create(model=MERGES[0], prompt=prompts[0]["prompt"], max_tokens=1)
    with safe_open(Path(exported[MERGES[0]]) / "adapter_model.safetensors", "np") as file:
        name = next(key for key in sorted(file.keys()) if ".lora_A." in key)
        row = file.get_tensor(name)[0]
    pattern = row.tobytes()[:256]
    assert len(set(row[:64].tolist())) > 32, "bytes that occur by chance nowhere"
    pids = processes_of(demo_server)
    try:
        in_worker = occurrences(pids["worker"], pattern)
    except PermissionError:
        pytest.skip("another process's memory may not be read here")
    assert in_worker >= 1
    assert pids["api"] != pids["worker"]
    assert occurrences(pids["api"], pattern) == 0
