# SPDX-License-Identifier: Apache-2.0
"""Tensor, pipeline and data parallel on two GPUs: what merged adapters answer there is what they answer on one.

Four servers of the demo's model, one after the other: about four minutes.
"""

import json
import time
import urllib.request

import pytest
import torch

from tests.conftest import CONFIG, DEMO, servers

MODES = {
    "tensor": ("--tensor-parallel-size", "2"),
    "pipeline": ("--pipeline-parallel-size", "2"),
    "data": ("--data-parallel-size", "2", "--api-server-count", "2"),
}
NAMES = ("ties", "task-arithmetic", "knots-ties", "upper")
GPU_OPTIONS = (
    *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "32"),
    *("--gpu-memory-utilization", "0.3", "--host", "127.0.0.1", "--uvicorn-log-level", "warning"),
)
MEAN, LARGEST = 0.02, 0.5  # |Δ log p| that bfloat16 sums in another order may make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.full,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]


def post(server, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def logprobs(server, name: str, texts: list[str]) -> torch.Tensor:
    """log p of every token but the first of every prompt, one prompt a request, so that data parallel shares them out."""
    values: list[float] = []
    for text in texts:
        answer = post(
            server,
            "/v1/completions",
            {"model": name, "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0},
        )
        assert answer["model"].startswith(f"{name}@")
        steps = answer["choices"][0]["prompt_logprobs"][1:]
        values += [next(iter(step.values()))["logprob"] for step in steps]
    return torch.tensor(values)


def artifacts(server) -> list[dict]:
    with urllib.request.urlopen(f"{server.url}/v1/merge/artifacts", timeout=60) as reply:
        return json.load(reply)["data"]


def hash_of(server, number: int, name: str) -> str:
    """The hash of an artifact's tensors, which a worker takes in the background."""
    deadline = time.monotonic() + 30
    while True:
        rows = artifacts(server)[number]["artifacts"]
        found = next(row["tensors_sha256"] for row in rows if row["name"].startswith(f"{name}@"))
        if found is not None:
            return found
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def start():
    """start(*options): `vllm-merge serve` of the demo on GPUs, as a context manager."""

    def run(*options: str):
        command = servers.merge_serve(DEMO / "model", CONFIG, *options, "--max-loras", "4", "--max-lora-rank", "64")
        return servers.running(command, {"VLLM_MERGE_CACHE_BYTES": str(1 << 30)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "CPU_OPTIONS", GPU_OPTIONS)
        patch.setattr(servers, "CPU_ENVIRONMENT", {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"})
        yield run


@pytest.fixture(scope="module")
def texts(prompts) -> list[str]:
    return [item["prompt"] for item in prompts[::20]]


@pytest.fixture(scope="module")
def on_one_gpu(start, texts) -> dict[str, torch.Tensor]:
    with start() as server:
        return {name: logprobs(server, name, texts) for name in NAMES}


@pytest.mark.parametrize("mode", MODES)
def test_two_gpus_answer_as_one_does(start, texts, on_one_gpu, mode):
    with start(*MODES[mode]) as server:
        workers = artifacts(server)
        assert len({worker["pid"] for worker in workers}) == 2
        for name in NAMES:
            difference = (logprobs(server, name, texts) - on_one_gpu[name]).abs()
            assert difference.mean() < MEAN, f"{name}: mean |Δ log p| {difference.mean():.4f}"
            assert difference.max() < LARGEST, f"{name}: largest |Δ log p| {difference.max():.4f}"
            hashes = [hash_of(server, number, name) for number in (0, 1)]
            assert hashes[0] == hashes[1], "every rank has the same bytes"


def test_the_bounds_tell_adapters_apart(on_one_gpu):
    values = list(on_one_gpu.values())
    for i, one in enumerate(values):
        for other in values[:i]:
            assert (one - other).abs().mean() > MEAN
