# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers for the tests, one of each kind for the whole session: starting one takes half a minute."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"
CONFIG = ROOT / "configs" / "demo.yaml"


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


servers = _load("vllm_merge_demo_server", DEMO / "server.py")


def pytest_collection_modifyitems(items):
    """Everything here that uses a server is marked so, and skipped, saying why, where vLLM is not installed."""
    missing = None if importlib.util.find_spec("vllm") else pytest.mark.skip(reason="vLLM is not installed")
    for item in items:
        if {"demo_server", "small_server", "offline_report"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)
            if missing:
                item.add_marker(missing)


@pytest.fixture(scope="session")
def prompts() -> list[dict]:
    """Held-out prompts of the demo: {task, prompt, answer}."""
    return [json.loads(line) for line in (DEMO / "eval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory):
    """`vllm-merge serve` with the demo's model and recipes, in float32; `.runtime` is the folder of the workers' sockets."""
    runtime = tmp_path_factory.mktemp("runtime")
    command = servers.merge_serve(DEMO / "model", CONFIG, "--max-loras", "4", "--max-lora-rank", "64")
    with servers.running(command, {"VLLM_MERGE_RUNTIME_DIR": str(runtime), "VLLM_PLUGINS": "another_plugin"}) as server:
        server.runtime = runtime
        yield server


@pytest.fixture
def client(demo_server):
    from openai import OpenAI

    with OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def processes_of(server) -> dict[str, int]:
    """{"api": pid, "worker": pid} of a server with one worker: the worker is the process that serves the control socket."""
    (socket,) = server.runtime.glob("worker-*.sock")
    return {"api": server.process.pid, "worker": int(socket.stem.split("-")[1])}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
