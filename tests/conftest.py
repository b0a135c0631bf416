# SPDX-License-Identifier: Apache-2.0
"""Real vLLM servers for the tests, one of each kind for the whole session: starting one takes half a minute."""

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
CONFIG = ROOT / "configs" / "demo.yaml"


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


servers = _load("vllm_merge_demo_server", DEMO / "server.py")


SERVER_FIXTURES = {
    "ab_server",
    "api_servers",
    "apis",
    "demo_server",
    "full_server",
    "live_server",
    "method_server",
    "offline_report",
    "parallel_server",
    "pooling_server",
    "small_server",
    "tight_server",
}


def pytest_collection_modifyitems(items):
    """Everything here that uses a server is marked so, and skipped, saying why, where vLLM is not installed."""
    missing = None if importlib.util.find_spec("vllm") else pytest.mark.skip(reason="vLLM is not installed")
    for item in items:
        if SERVER_FIXTURES & set(getattr(item, "fixturenames", ())):
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
    environment = {"VLLM_MERGE_RUNTIME_DIR": str(runtime), "VLLM_PLUGINS": "another_plugin", "VLLM_MERGE_ADHOC": "on"}
    with servers.running(command, environment) as server:
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


API_KEY = "a-key"


@pytest.fixture(scope="module")
def small_server(tmp_path_factory):
    """vLLM's own server module with VLLM_MERGE_CONFIG alone, two slots, an API key, and files that the tests may destroy.

    `.files` holds the recipe file and every adapter. Adapters a0 … a49 are one adapter at 50 alphas; m0 … m5 merge two
    tasks each; `slow` takes seconds to merge; `gone` uses an adapter that a test deletes; `high` has a rank that no
    slot takes; `alone` is for a test of its own.
    """
    import shutil

    import yaml

    files = tmp_path_factory.mktemp("files")
    runtime = tmp_path_factory.mktemp("runtime")
    sources = sorted(path.name for path in (DEMO / "adapters").iterdir())
    for name in sources:
        shutil.copytree(DEMO / "adapters" / name, files / name)
    for i in range(51):
        name = f"a{i}" if i < 50 else "doomed"
        shutil.copytree(DEMO / "adapters" / sources[0], files / name)
        path = files / name / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * (0.51 + i / 50)}))
    everything = [{"adapter": name} for name in sources]

    def arithmetic(*names: str) -> dict:
        """The first at full weight, the others at a third."""
        weights = [1.0] + [0.3] * (len(names) - 1)
        inputs = [{"adapter": n, "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)]
        return {"merge_method": "task_arithmetic", "adapters": inputs, "load": "lazy"}

    recipes = {f"m{i}": arithmetic(sources[i], sources[i + 1]) for i in range(6)}
    recipes["slow"] = {
        "merge_method": "ties",
        "space": "delta",
        "adapters": everything * 12,
        "load": "lazy",
        "rank": 64,
    }
    recipes["gone"] = arithmetic("doomed", sources[1])
    recipes["high"] = {
        "merge_method": "ties",
        "space": "delta",
        "adapters": everything,
        "load": "lazy",
        "rank": "lossless",
    }
    recipes["alone"] = arithmetic(*sources[:3])
    names = [*sources, "doomed", *(f"a{i}" for i in range(50))]
    document = {"version": 1, "adapters": {name: {"path": f"./{name}"} for name in names}, "recipes": recipes}
    (files / "recipes.yaml").write_text(yaml.safe_dump(document))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO / "model")]
    options = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "64", "--api-key", API_KEY]
    environment = {
        "VLLM_MERGE_CONFIG": str(files / "recipes.yaml"),
        "VLLM_MERGE_RUNTIME_DIR": str(runtime),
        "VLLM_MERGE_SOURCE_BYTES": "0",  # an adapter whose file is gone is gone
    }
    with servers.running([*command, *options], environment) as server:
        server.runtime, server.files = runtime, files
        yield server


class Control:
    """A worker's control socket, spoken to from a test."""

    def __init__(self, server):
        (path,) = server.runtime.glob("worker-*.sock")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rwb")

    def call(self, op: str, **fields) -> dict:
        self._lines.write(json.dumps({"id": 1, "op": op, **fields}).encode() + b"\n")
        self._lines.flush()
        while "result" not in (message := json.loads(self._lines.readline())):
            assert "error" not in message, message
        return message["result"]

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def control(small_server):
    control = Control(small_server)
    yield control
    control.close()
