# SPDX-License-Identifier: Apache-2.0
"""A real server and its clients, for the benchmarks of what serving feels: models, adapters, servers, endless streams."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from shapes import SHAPES, ModelShape, random_factors

from vllm_merge.serving import launch

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "examples" / "demo" / "model"
ADAPTERS, RANK = 8, 16
SUM = ADAPTERS * RANK
PROMPT = 64  # tokens of a prompt, one per letter
STREAMS = 16
SETTLE = 1.0  # seconds that streams run before they are watched
ANSWER = 3900  # tokens of a stream's answer: longer than a window, and short of --max-model-len
QUICK: dict[str, Any] = {"shape": "small", "eager": True, "window": 4.0, "acts": 3, "cold": 3}
QUICK |= {"cache_gib": 0.2, "host_gib": 0.05, "merges": 60, "rounds": 1, "round_seconds": 2.0, "kv_gib": 1}


def server_arguments(parser: argparse.ArgumentParser, port: int) -> None:
    """The arguments that every benchmark of a server has."""
    parser.add_argument("--quick", action="store_true", help="a small model and tiny windows: does all of it run here?")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--cache-gib", type=float, default=16, help="VLLM_MERGE_CACHE_BYTES, in GiB")
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("server_options", nargs="*", help="further options for vLLM, after --")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments; what --quick sets gives way to what is said. `started` is now. A SIGTERM stops the servers too."""
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return parser.parse_args(namespace=argparse.Namespace(started=time.monotonic()))


def write_model(folder: Path, shape: ModelShape) -> None:
    """A Llama's configuration and the demo's tokenizer; the weights are dummies."""
    folder.mkdir()
    for file in TOKENIZER.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, shape: ModelShape, rank: int, seed: int, device: str) -> None:
    """A random bfloat16 adapter on all seven projections."""
    folder.mkdir()
    tensors = {}
    for module, a, b in random_factors(shape, rank, seed, device):
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.cpu()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.cpu()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[1] for name in shape.projections})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass(frozen=True)
class Place:
    """A folder with `model`, the adapters `a0` … of rank 16, and `v16` and `v128` for vLLM's own loading."""

    folder: Path
    shape: ModelShape

    @classmethod
    @contextlib.contextmanager
    def made(cls, shape: ModelShape) -> Iterator[Place]:
        """A new one; the folder is gone afterwards."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with tempfile.TemporaryDirectory(prefix="vllm-merge-bench-", ignore_cleanup_errors=True) as folder:
            place = cls(Path(folder), shape)
            write_model(place.model, shape)
            for index in range(ADAPTERS):
                write_adapter(place.folder / f"a{index}", shape, RANK, index, device)
            for rank in (RANK, SUM):
                write_adapter(place.plain(rank), shape, rank, 100 + rank, device)
            if device == "cuda":
                torch.cuda.empty_cache()
            yield place

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def plain(self, rank: int) -> Path:
        """An adapter that vLLM loads by itself."""
        return self.folder / f"v{rank}"

    def write_recipes(self, kinds: dict[str, tuple[int, dict[str, Any]]]) -> Path:
        """`number` recipes `kind-0`, … of each kind, all cold; a λ that no other has makes each an artifact of its own."""
        numbers = count()
        recipes = {
            f"{kind}-{index}": {
                "adapters": [{"adapter": f"a{i}"} for i in range(ADAPTERS)],
                "load": "lazy",
                **recipe,
                "parameters": {**recipe.get("parameters", {}), "lambda": round(0.3 + 0.001 * next(numbers), 4)},
            }
            for kind, (number, recipe) in kinds.items()
            for index in range(number)
        }
        adapters = {f"a{i}": {"path": f"./a{i}"} for i in range(ADAPTERS)}
        path = self.folder / "recipes.yaml"
        path.write_text(yaml.safe_dump({"version": 1, "adapters": adapters, "recipes": recipes}))
        return path


LINEAR = {"merge_method": "linear"}
KNOTS_TIES = {"merge_method": "ties", "space": "knots"}


@dataclass(frozen=True)
class Server:
    """A server that runs. `name`: of its base model in requests."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    name: str

    async def up(self) -> None:
        """Return once it answers. Raises RuntimeError with the end of its log where it ends instead."""
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/health") as answer:
                        if answer.status == 200:
                            return
                if self.process.poll() is not None:
                    raise RuntimeError(f"the server ended:\n{self.log.read_text(errors='replace')[-4000:]}")
                await asyncio.sleep(0.5)


@contextlib.contextmanager
def server(
    place: Place, recipes: Path | None, port: int, options: Sequence[str], environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """A server on `port`, started but not waited for: with the plugin and these recipes, or vLLM alone."""
    every = [*COMMON, "--port", str(port), *([] if torch.cuda.is_available() else ON_A_CPU), *options]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    variables.pop("VLLM_MERGE_CONFIG", None)
    if recipes is None:
        command = launch.command(str(place.model), ["--enable-lora", *every])
        variables["VLLM_PLUGINS"] = ""
    else:
        command = [sys.executable, "-m", "vllm_merge", "serve", str(place.model), "--config", str(recipes), *every]
    variables |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1", **(environment or {})}
    # vLLM's processes import the worker extension from here.
    variables["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [variables.get("PYTHONPATH")])])
    log = place.folder / f"server-{port}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=variables, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log, str(place.model))
    finally:
        text = log.read_text(errors="replace")
        told = [line for line in text.splitlines() if "vllm_merge" in line or "rror" in line]
        print("\n".join(told)[-1500:], flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


COMMON = (
    *("--load-format", "dummy", "--max-lora-rank", str(SUM), "--max-loras", "6", "--max-cpu-loras", "8"),
    *("--max-model-len", "4096", "--max-num-seqs", "32", "--host", "127.0.0.1", "--uvicorn-log-level", "warning"),
    *("--worker-extension-cls", "worker_memory.WorkerMemory"),
)
# vLLM's share of a CPU's memory is of what the machine has, others' use of it included.
ON_A_CPU = ("--gpu-memory-utilization", "0.3")


def graph_options(eager: bool) -> list[str]:
    """vLLM captures graphs up to twice --max-num-seqs tokens. A new prompt beside the streams' tokens must be within: on a
    server of ordinary size it is, and a step outside runs kernel by kernel, several times as long.

    The mode is vLLM's default, full graphs of steps without a new prompt and piecewise ones of the others. With full graphs
    of all steps those that take up a prompt were no shorter on an H100 (28 ms, not 22), and idle streams had gaps of two
    steps (99th percentile 24.5 ms, not 13.2).
    """
    return ["--enforce-eager"] if eager else ["--max-cudagraph-capture-size", str(2 * PROMPT)]


class Client:
    """Requests to one server."""

    _prompts = count()

    def __init__(self, session: aiohttp.ClientSession, server: Server) -> None:
        self.session, self.server = session, server

    async def first_token(self, model: str) -> float:
        """Seconds from the request to its first token; every prompt is new from its first block. Raises RuntimeError."""
        started = time.perf_counter()
        prompt = f"{next(self._prompts):0{PROMPT}}"[::-1]  # no two share a prefix that vLLM would have cached
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        async with self.session.post(f"{self.server.url}/v1/completions", json=body) as answer:
            text = await answer.text()
            if answer.status != 200:
                raise RuntimeError(f"{model}: {answer.status} {text[:300]}")
        return time.perf_counter() - started

    async def load(self, name: str, folder: Path) -> float:
        """Seconds of vLLM's own loading of an adapter."""
        started = time.perf_counter()
        body = {"lora_name": name, "lora_path": str(folder)}
        async with self.session.post(f"{self.server.url}/v1/load_lora_adapter", json=body) as answer:
            if answer.status != 200:
                raise RuntimeError(f"load of {name}: {answer.status} {(await answer.text())[:300]}")
        return time.perf_counter() - started

    async def get(self, path: str) -> Any:
        async with self.session.get(f"{self.server.url}{path}") as answer:
            answer.raise_for_status()
            return await answer.json()

    async def memory(self) -> dict[str, float]:
        """Bytes that the server's processes and its first worker hold: resident, pinned, allocated, reserved."""
        async with self.session.post(f"{self.server.url}/collective_rpc", json={"method": "memory_in_bytes"}) as answer:
            answer.raise_for_status()
            first_worker = (await answer.json())["results"][0]
        return {"resident": resident_bytes(self.server.process.pid), **first_worker}


def resident_bytes(pid: int) -> float:
    """Of a process and all its children; pages that they share count once each."""
    import psutil  # type: ignore[import-untyped]  # comes with vLLM

    parent = psutil.Process(pid)
    total = 0.0
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


class Streams:
    """Streams that never end: each starts anew when its answer is complete.

    Of `phase` the gaps are kept: when each ended, and how long it was, in seconds.
    """

    def __init__(self, client: Client, models: Sequence[str], number: int) -> None:
        self._client = client
        self.phase: str | None = None
        self.gaps: dict[str, list[tuple[float, float]]] = {}
        self.tokens = 0
        self._begun = 0
        self._number = number
        self._running = asyncio.gather(*(self._stream(models[i % len(models)]) for i in range(number)))

    async def begun(self) -> None:
        """Return once every stream has had a token. Raises what a stream ended with."""
        while self._begun < self._number:
            self.check()
            await asyncio.sleep(0.05)

    def check(self) -> None:
        """Raises what a stream ended with."""
        if self._running.done():
            self._running.result()

    async def stop(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def _stream(self, model: str) -> None:
        url = f"{self._client.server.url}/v1/completions"
        body = {"model": model, "prompt": "a" * PROMPT, "max_tokens": ANSWER, "temperature": 0, "stream": True}
        first = True
        while True:
            async with self._client.session.post(url, json={**body, "ignore_eos": True}) as answer:
                answer.raise_for_status()
                last = None
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    self.tokens += 1
                    self._begun += first
                    first = False
                    if last is not None and self.phase is not None:
                        self.gaps.setdefault(self.phase, []).append((now, now - last))
                    last = now

    def row(self, phase: str) -> dict[str, Any]:
        """Quantiles of a phase's gaps, in milliseconds; how many had which length, by whole milliseconds; and when, seconds after
        the first one, those ended that were longer than a step and a half, the longest of all streams at that moment.

        Raises RuntimeError where no stream had a token in it.
        """
        if phase not in self.gaps:
            raise RuntimeError(f"no stream had a token in phase {phase}; make its window longer")
        ends, gaps = np.array(self.gaps[phase]).T
        gaps = gaps * 1e3
        p50, p99, p999 = (round(float(v), 2) for v in np.percentile(gaps, [50, 99, 99.9]))
        longest = round(float(gaps.max()), 2)
        lengths, counts = np.unique(gaps.astype(int), return_counts=True)
        slow: dict[float, float] = {}
        for end, gap in zip(ends - ends.min(), gaps, strict=True):
            if gap > 1.5 * p50:
                moment = round(float(end), 2)
                slow[moment] = max(slow.get(moment, 0.0), round(float(gap), 1))
        return {
            "phase": phase,
            "p50": p50,
            "p99": p99,
            "p999": p999,
            "max": longest,
            "n": len(gaps),
            "by_length": dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)),
            "slow": sorted(slow.items()),
        }


@contextlib.asynccontextmanager
async def streaming(client: Client, models: Sequence[str], number: int) -> AsyncIterator[Streams]:
    """`number` streams over these models in turn, each warmed up before, once all of them run and SETTLE seconds are over."""
    for model in models:
        await client.first_token(model)
    streams = Streams(client, models, number)
    try:
        await streams.begun()
        await asyncio.sleep(SETTLE)
        yield streams
    finally:
        await streams.stop()


@contextlib.asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Client]:
    """A client without time limits, whose own collections of garbage do not look like gaps of the server's."""
    gc.collect()
    gc.freeze()
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, read_bufsize=1 << 20) as session:
        yield Client(session, server)


def facts(shape: ModelShape, eager: bool) -> dict[str, Any]:
    """What a result was measured on."""
    from datetime import date

    import vllm

    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "shape": shape.name,
        "cuda_graphs": gpu and not eager,
    }


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a result; the file is whole at any time."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
