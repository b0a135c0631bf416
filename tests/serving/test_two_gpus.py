# SPDX-License-Identifier: Apache-2.0
"""Tensor, pipeline and data parallel on two GPUs: what merged adapters answer there is what they answer on one.

Four servers of the demo's model, all at once: about two minutes.
"""

import json

import pytest
import torch

from tests.conftest import CONFIG, DEMO, servers
from tests.serving.gpu_servers import MIB, START_SECONDS, artifacts, gpu, needs_gpus, post, start, wait_until

ONE = "one GPU"
MODES = {
    "tensor": ("--tensor-parallel-size", "2"),
    "tensor, fully sharded": ("--tensor-parallel-size", "2", "--fully-sharded-loras"),
    "pipeline": ("--pipeline-parallel-size", "2"),
    "data": ("--data-parallel-size", "2", "--api-server-count", "2"),
}
NAMES = ("ties", "task-arithmetic", "knots-ties", "upper")
BASE = str(DEMO / "model")
OPTIONS = ("--enforce-eager", "--max-model-len", "256", "--max-loras", "4", "--max-lora-rank", "64")
# Sums of bfloat16 in another order make something of the base model's answers too, on the mean; a merge's factors make it more.
TIMES, MEAN = 3.0, 0.02

pytestmark = [pytest.mark.gpu, pytest.mark.full, needs_gpus(2)]


def logprobs(server, name: str, texts: list[str]) -> torch.Tensor:
    """log p of every token but the first of every prompt, one prompt a request, so that data parallel shares them out."""
    values: list[float] = []
    for text in texts:
        answer = post(
            server,
            "/v1/completions",
            {"model": name, "prompt": text, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0},
        )
        assert answer["model"].startswith(name if name == BASE else f"{name}@")
        steps = answer["choices"][0]["prompt_logprobs"][1:]
        values += [next(iter(step.values()))["logprob"] for step in steps]
    return torch.tensor(values)


def hash_of(server, number: int, name: str) -> str:
    """The hash of an artifact's tensors, which a worker takes in the background."""
    found: list[str] = []

    def there() -> bool:
        rows = artifacts(server)[number]["artifacts"]
        found[:] = [
            row["tensors_sha256"] for row in rows if row["name"].startswith(f"{name}@") and row["tensors_sha256"]
        ]
        return bool(found)

    wait_until(there)
    return found[0]


@pytest.fixture(scope="module")
def started():
    """A server of each mode and one on one GPU, which start side by side."""
    with gpu():
        running = {
            mode: start(
                servers.merge_serve(DEMO / "model", CONFIG, *OPTIONS, *MODES.get(mode, ())),
                VLLM_MERGE_CACHE_BYTES=str(1024 * MIB),
            )
            for mode in (ONE, *MODES)
        }
        yield running
        for server in running.values():
            server.stop()


@pytest.fixture(scope="module")
def texts(prompts) -> list[str]:
    return [item["prompt"] for item in prompts[::20]]


@pytest.fixture(scope="module")
def on_one_gpu(started, texts) -> dict[str, torch.Tensor]:
    started[ONE].wait(START_SECONDS)
    return {name: logprobs(started[ONE], name, texts) for name in (*NAMES, BASE)}


@pytest.mark.parametrize("mode", MODES)
def test_two_gpus_answer_as_one_does(started, texts, on_one_gpu, mode, record_property):
    server = started[mode]
    server.wait(START_SECONDS)
    workers = artifacts(server)
    assert len({worker["pid"] for worker in workers}) == 2
    found: dict[str, list[float]] = {}
    hashes: dict[str, list[str]] = {}
    for name in (*NAMES, BASE):
        difference = (logprobs(server, name, texts) - on_one_gpu[name]).abs()
        found[name] = [round(float(difference.mean()), 5), round(float(difference.max()), 4)]
        if name != BASE:
            hashes[name] = [hash_of(server, 0, name), hash_of(server, 1, name), hash_of(started[ONE], 0, name)]
    record_property("|Δ log p| to one GPU, mean and largest", json.dumps(found))
    record_property("same bytes on both and on one GPU", json.dumps({n: len(set(h)) == 1 for n, h in hashes.items()}))
    bound = max(MEAN, TIMES * found[BASE][0])
    wrong = [f"{name}: mean |Δ log p| {found[name][0]}" for name in NAMES if found[name][0] > bound]
    wrong += [f"{name}: other bytes {h}" for name, h in hashes.items() if len(set(h)) > 1]
    assert not wrong, "\n".join(wrong)
    for i, name in enumerate(NAMES):
        for other in NAMES[:i]:
            apart = float((on_one_gpu[name] - on_one_gpu[other]).abs().mean())
            assert apart > 2 * bound, f"the bound tells {name} from {other}"
