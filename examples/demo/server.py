# SPDX-License-Identifier: Apache-2.0
"""Start a real vLLM server on this machine's CPU, wait until it answers, stop it. Used by the demo and by the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# What vLLM needs on a CPU: a small share of the memory, a small KV cache, no compilation, no outside world.
CPU_OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "32"),
    *("--gpu-memory-utilization", "0.3", "--host", "127.0.0.1", "--uvicorn-log-level", "warning"),
)
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait must not keep others off the few cores there are
}


class Server:
    """A running server. `log` is a file with everything that it printed."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
        return False

    def wait(self, seconds: float, tick: Callable[[float], None] | None = None) -> None:
        """Until /health answers. Raises RuntimeError with the end of the log if the server ends or takes too long."""
        started = time.monotonic()
        while not self.answers():
            elapsed = time.monotonic() - started
            if self.process.poll() is not None or elapsed > seconds:
                how = (
                    f"ended with {self.process.returncode}"
                    if self.process.poll() is not None
                    else f"was silent for {seconds:.0f} s"
                )
                raise RuntimeError(f"the vLLM server {how}; the end of {self.log}:\n{self.tail()}")
            if tick is not None:
                tick(elapsed)
            time.sleep(0.3)

    def tail(self, characters: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-characters:]

    def stop(self) -> None:
        """Stop the server and every process it started."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Server:
    """Start a server command (`--port` and the CPU's options are added); returns at once."""
    port = free_port()
    log = Path(tempfile.mkstemp(prefix="vllm-merge-server-", suffix=".log")[1])
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, *CPU_OPTIONS, "--port", str(port)],
            env={**os.environ, **CPU_ENVIRONMENT, **(environment or {})},
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Server(process, port, log)


def merge_serve(model: Path, config: Path, *options: str) -> list[str]:
    """The command line of `vllm-merge serve`, by this Python."""
    return [sys.executable, "-m", "vllm_merge", "serve", str(model), "--config", str(config), *options]


@contextlib.contextmanager
def running(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    seconds: float = 300,
    tick: Callable[[float], None] | None = None,
) -> Iterator[Server]:
    server = start(command, environment)
    try:
        server.wait(seconds, tick)
        yield server
    finally:
        server.stop()
