# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers on GPUs for the tests marked `gpu`: small ones, several of which share a GPU.

Starting one takes one to two minutes, so the tests start theirs side by side, also in several pytest processes. Those that
must have a GPU alone, as they fill it or free its memory, wait for the others.
"""

import contextlib
import fcntl
import importlib.util
import json
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import servers

MIB = 1 << 20
# The KV cache's size is given, so that vLLM does not measure what is free while others start.
OPTIONS = (
    *("--dtype", "bfloat16", "--max-num-seqs", "8", "--gpu-memory-utilization", "0.1"),
    *("--kv-cache-memory-bytes", str(256 * MIB), "--host", "127.0.0.1", "--uvicorn-log-level", "warning"),
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_SERVER_DEV_MODE": "1",  # /sleep, /collective_rpc
    "VLLM_MERGE_CACHE_BYTES": str(256 * MIB),
    "VLLM_MERGE_WORKSPACE_BYTES": str(256 * MIB),
}
START_SECONDS = 400.0
LOCK = Path(tempfile.gettempdir()) / "vllm-merge-tests-gpu.lock"


def needs_gpus(number: int) -> pytest.MarkDecorator:
    """Skips where there are fewer, or no vLLM."""
    if not importlib.util.find_spec("vllm"):
        return pytest.mark.skip(reason="vLLM is not installed")
    return pytest.mark.skipif(torch.cuda.device_count() < number, reason=f"needs {number} CUDA devices")


def start(command: list[str], **environment: str) -> servers.Server:
    """Start a server on the GPUs; returns at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "CPU_OPTIONS", OPTIONS)
        patch.setattr(servers, "CPU_ENVIRONMENT", ENVIRONMENT)
        return servers.start(command, environment)


@contextlib.contextmanager
def running(
    command: list[str], meanwhile: Callable[[], object] = lambda: None, **environment: str
) -> Iterator[servers.Server]:
    """The server once it answers; no test has the GPU alone while it starts. meanwhile: what is done beside that."""
    with gpu():
        server = start(command, **environment)
        try:
            meanwhile()
            server.wait(START_SECONDS)
        except BaseException:
            server.stop()
            raise
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def gpu(alone: bool = False) -> Iterator[None]:
    """Among the tests of this machine: while one has the GPU alone no other has it, and it waits for those that do."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def filled(device: int = 0, *, leaving: int) -> Iterator[None]:
    """The device's memory taken, but for `leaving` bytes."""
    held: list[torch.Tensor] = []
    while (more := torch.cuda.mem_get_info(device)[0] - leaving) > 4 * MIB:
        held.append(torch.empty(more // (2 * MIB) * (2 * MIB), dtype=torch.uint8, device=f"cuda:{device}"))
    try:
        yield
    finally:
        held.clear()
        torch.cuda.empty_cache()


def post(server: servers.Server, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """What the server answers to a body of JSON; None where that is nothing, or no JSON. Raises urllib.error.HTTPError."""
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        answer = reply.read()
    with contextlib.suppress(ValueError):
        return json.loads(answer)
    return None


def get(server: servers.Server, path: str) -> Any:
    with urllib.request.urlopen(server.url + path, timeout=60) as reply:
        return json.load(reply)


def artifacts(server: servers.Server) -> list[dict[str, Any]]:
    """What each worker holds."""
    workers: list[dict[str, Any]] = get(server, "/v1/merge/artifacts")["data"]
    return workers


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
