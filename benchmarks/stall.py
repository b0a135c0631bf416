# SPDX-License-Identifier: Apache-2.0
"""What running requests feel of a merge: inter-token gaps of streams on a real server while adapters are merged or loaded.

    python benchmarks/stall.py --model DIR --shape llama-3-8b --out benchmarks/results/stall.json

Starts a vLLM server with dummy weights of the shape and eight random adapters of rank 16, keeps 16 streams running (base
and adapters mixed), and records the time between tokens of every stream in phases: idle, request-time merges of each kind
(every recipe is new: cold, then used once), vLLM's own loading of an adapter of rank 16 and of the merges' rank. The files
are in the page cache. `idle` is measured before and after, so that its own spread can be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch
import yaml
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
TOKENIZER = HERE.parent / "examples" / "demo" / "model"
SHAPES = {
    "llama-3-8b": {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "small": {"hidden": 512, "mlp": 1024, "layers": 4, "heads": 8, "kv_heads": 4, "vocab": 4096},
}
ADAPTERS, RANK, STREAMS = 8, 16, 16


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """A Llama's configuration and the demo's tokenizer; the weights are dummies."""
    folder.mkdir()
    for file in TOKENIZER.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "vocab_size": shape["vocab"],
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_adapter(folder: Path, shape: dict[str, int], rank: int, seed: int, device: str) -> None:
    """A random bfloat16 adapter on all seven projections."""
    folder.mkdir()
    hidden, mlp = shape["hidden"], shape["mlp"]
    kv = hidden // shape["heads"] * shape["kv_heads"]
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for layer in range(shape["layers"]):
        for name, (rows, columns) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(rank, columns, generator=generator, device=device) / columns**0.5
            b = torch.randn(rows, rank, generator=generator, device=device) / rank**0.5 / 100
            tensors[f"{key}.lora_A.weight"] = a.bfloat16().cpu()
            tensors[f"{key}.lora_B.weight"] = b.bfloat16().cpu()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[1] for name in sizes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_recipes(path: Path, merges: int) -> None:
    """`merges` cold recipes of each kind; a different λ makes each a new artifact."""
    inputs = [{"adapter": f"a{i}"} for i in range(ADAPTERS)]
    recipes: dict[str, Any] = {}
    for i in range(merges):
        shared = {"adapters": inputs, "load": "lazy", "parameters": {"lambda": 0.3 + 0.01 * i}}
        recipes[f"linear-{i}"] = {**shared, "merge_method": "linear"}
        recipes[f"knots-ties-{i}"] = {**shared, "merge_method": "ties", "space": "knots"}
    adapters = {f"a{i}": {"path": f"./a{i}"} for i in range(ADAPTERS)}
    path.write_text(yaml.safe_dump({"version": 1, "adapters": adapters, "recipes": recipes}))


class Streams:
    """Streams that never end: each starts anew when its answer is complete. Gaps are kept by phase, in seconds."""

    def __init__(self, session: aiohttp.ClientSession, url: str, models: list[str]) -> None:
        self._session, self._url, self._models = session, url, models
        self.phase = "warm-up"
        self.gaps: dict[str, list[float]] = {}
        self.tokens = 0

    def start(self) -> None:
        self._running = asyncio.gather(*(self._stream(self._models[i % len(self._models)]) for i in range(STREAMS)))

    def check(self) -> None:
        """Raises what a stream ended with."""
        if self._running.done():
            self._running.result()

    async def stop(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running

    async def _stream(self, model: str) -> None:
        while True:
            body = {"model": model, "prompt": "a" * 64, "max_tokens": 2000, "temperature": 0, "stream": True}
            async with self._session.post(f"{self._url}/v1/completions", json={**body, "ignore_eos": True}) as answer:
                answer.raise_for_status()
                last = None
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps.setdefault(self.phase, []).append(now - last)
                        self.tokens += 1
                    last = now

    def row(self, phase: str) -> dict[str, Any]:
        gaps = np.array(self.gaps[phase]) * 1e3
        p50, p99, p999 = (round(float(v), 2) for v in np.percentile(gaps, [50, 99, 99.9]))
        return {
            "phase": phase,
            "p50": p50,
            "p99": p99,
            "p999": p999,
            "max": round(float(gaps.max()), 2),
            "n": len(gaps),
        }


async def first_token(session: aiohttp.ClientSession, url: str, model: str) -> float:
    """Seconds from the request to its first token."""
    started = time.perf_counter()
    body = {"model": model, "prompt": "b" * 64, "max_tokens": 1, "temperature": 0}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise RuntimeError(f"{model}: {answer.status} {text[:300]}")
    return time.perf_counter() - started


@contextlib.asynccontextmanager
async def streaming(session: aiohttp.ClientSession, url: str, models: list[str]) -> AsyncIterator[Streams]:
    streams = Streams(session, url, models)
    streams.start()
    try:
        yield streams
    finally:
        await streams.stop()


async def measure(url: str, folder: Path, merges: int, knots_merges: int, idle: float, loads: int) -> dict[str, Any]:
    """All phases on a running server."""
    report: dict[str, Any] = {"rows": [], "first_token_seconds": {}}
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, read_bufsize=1 << 20) as session:
        base = (await (await session.get(f"{url}/v1/models")).json())["data"][0]["id"]
        models = [base, "a0", "a1", "a2"]
        for model in models:
            await first_token(session, url, model)
        async with streaming(session, url, models) as streams:
            await asyncio.sleep(5)

            async def phase(name: str, times: int, act: Any) -> None:
                streams.phase = name
                seconds = []
                for i in range(times):
                    seconds.append(await act(i))
                    await asyncio.sleep(0.3)
                streams.check()
                streams.phase = "between"
                report["rows"].append(streams.row(name))
                if seconds and seconds[0] is not None:
                    report["first_token_seconds"][name] = [round(s, 4) for s in seconds]
                print(report["rows"][-1], [round(s, 3) for s in seconds if s is not None][:8], flush=True)
                await asyncio.sleep(1)

            async def wait(_: int) -> None:
                await asyncio.sleep(idle)

            async def load(rank: int, i: int) -> float:
                started = time.perf_counter()
                body = {"lora_name": f"v{rank}-{i}", "lora_path": str(folder / f"v{rank}")}
                async with session.post(f"{url}/v1/load_lora_adapter", json=body) as answer:
                    assert answer.status == 200, await answer.text()
                took = time.perf_counter() - started
                await first_token(session, url, body["lora_name"])
                return took

            await phase("idle", 1, wait)
            await phase("merge_linear", merges, lambda i: first_token(session, url, f"linear-{i}"))
            await phase("merge_knots_ties", knots_merges, lambda i: first_token(session, url, f"knots-ties-{i}"))
            last = f"knots-ties-{knots_merges - 1}"
            await phase("in_slot", 5, lambda i: first_token(session, url, last))
            await phase("in_cache", min(5, merges), lambda i: first_token(session, url, f"linear-{merges - 1 - i}"))
            await phase("vllm_load_r16", loads, lambda i: load(RANK, i))
            await phase("vllm_load_r128", loads, lambda i: load(RANK * ADAPTERS, i))
            await phase("idle_again", 1, wait)
        async with session.get(f"{url}/v1/merge/recipes") as answer:
            rows = (await answer.json())["data"]
        done = [r for r in rows if r["kind"] == "recipe" and r.get("seconds")]
        report["merge_seconds"] = {
            kind: sorted(round(r["seconds"], 4) for r in done if r["name"].startswith(kind))
            for kind in ("linear", "knots-ties")
        }
        report["rank"] = max((r["rank"] for r in done), default=None)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--merges", type=int, default=20)
    parser.add_argument("--knots-merges", type=int, default=20)
    parser.add_argument("--loads", type=int, default=6)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of each idle window")
    parser.add_argument("--out", type=Path, default=Path("stall.json"))
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("server_options", nargs="*", help="further options for vLLM, after --")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(tempfile.mkdtemp(prefix="vllm-merge-stall-"))
    write_model(folder / "model", shape)
    for i in range(ADAPTERS):
        write_adapter(folder / f"a{i}", shape, RANK, i, device)
    for rank in (RANK, RANK * ADAPTERS):
        write_adapter(folder / f"v{rank}", shape, rank, 100 + rank, device)
    write_recipes(folder / "recipes.yaml", options.merges)
    if device == "cuda":
        torch.cuda.empty_cache()
    command = [
        sys.executable,
        "-m",
        "vllm_merge",
        "serve",
        str(folder / "model"),
        "--config",
        str(folder / "recipes.yaml"),
    ]
    command += ["--load-format", "dummy", "--max-loras", "6", "--max-cpu-loras", "8", "--max-lora-rank", "128"]
    command += ["--max-model-len", "4096", "--port", str(options.port), "--host", "127.0.0.1", "--max-num-seqs", "32"]
    command += [
        "--uvicorn-log-level",
        "warning",
        *(["--enforce-eager"] if options.eager else []),
        *options.server_options,
    ]
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_MERGE_CACHE_BYTES": str(16 << 30)}
    log = folder / "server.log"
    started = time.monotonic()
    with log.open("wb") as sink:
        server = subprocess.Popen(
            command, env=environment, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{options.port}"
    try:
        asyncio.run(wait_for(url, server, log))
        print(f"server up after {time.monotonic() - started:.0f} s", flush=True)
        report = asyncio.run(measure(url, folder, options.merges, options.knots_merges, options.idle, options.loads))
    finally:
        text = log.read_text(errors="replace")
        print("\n".join(line for line in text.splitlines() if "vllm_merge" in line or "rror" in line)[-1500:])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
    import vllm

    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "shape": options.shape,
        "cuda_graphs": not options.eager,
        "streams": STREAMS,
        "unit": "milliseconds between tokens",
        **report,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {options.out}")


async def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        return
            if server.poll() is not None:
                raise RuntimeError(f"the server ended:\n{log.read_text(errors='replace')[-4000:]}")
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    main()
