# SPDX-License-Identifier: Apache-2.0
"""Tensor, pipeline and data parallel on the CPU: every rank of every engine is ready, and answers are the reference's.

Each mode is a server of two workers; the reference is transformers + PEFT, as in test_exactness.
"""

import json
import time
import urllib.request

import pytest

from tests.conftest import CONFIG, DEMO, servers
from tests.serving.test_exactness import LIMIT, exported, largest_difference, reference  # noqa: F401  (fixtures)
from tests.serving.test_routes import RECIPES

MODES = {
    "tensor": ("--tensor-parallel-size", "2"),
    "tensor, fully sharded": ("--tensor-parallel-size", "2", "--fully-sharded-loras"),
    "pipeline": ("--pipeline-parallel-size", "2"),
    "data": ("--data-parallel-size", "2", "--api-server-count", "2"),
}
NAMES = ("ties", "task-arithmetic", "upper")  # of rank 64, of a lower one, an adapter by itself

pytestmark = pytest.mark.full


def post(server, path: str, body: dict) -> dict:
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return json.load(reply)


def get(server, path: str) -> dict:
    with urllib.request.urlopen(server.url + path, timeout=60) as reply:
        return json.load(reply)


def hash_of(server, number: int, digest: str) -> str | None:
    """The hash of the tensors of an artifact, as a worker has it; None as long as it was not taken."""
    worker = get(server, "/v1/merge/artifacts")["data"][number]
    return next(row["tensors_sha256"] for row in worker["artifacts"] if row["digest"] == digest)


@pytest.fixture(scope="module", params=MODES)
def parallel_server(request):
    """`vllm-merge serve` of the demo in one of the modes."""
    options = (*MODES[request.param], "--max-loras", "4", "--max-lora-rank", "64")
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two workers on few cores
        "OMP_NUM_THREADS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
    }
    with servers.running(servers.merge_serve(DEMO / "model", CONFIG, *options), environment) as server:
        if request.param == "pipeline":
            # The buffers that a later stage receives into are made by a dummy run, which vLLM's CPU worker leaves out
            # where LoRA is on: without it the first request ends the engine.
            post(server, "/collective_rpc", {"method": "execute_dummy_batch"})
        yield server


def test_ready_means_every_rank_of_every_engine(parallel_server):
    rows = get(parallel_server, "/v1/merge/recipes")["data"]
    eager = [row for row in rows if row["kind"] == "recipe" and RECIPES.recipes[row["name"]].load == "eager"]
    assert eager
    assert {row["state"] for row in eager} == {"ready"}
    digests = [row["digest"] for row in eager]
    deadline = time.monotonic() + 30
    while None in (hashes := [hash_of(parallel_server, number, digest) for number in (0, 1) for digest in digests]):
        assert time.monotonic() < deadline, "hashes are taken in the background"
        time.sleep(0.1)
    assert hashes[: len(digests)] == hashes[len(digests) :], "every rank has the same whole factors"
    assert len({worker["pid"] for worker in get(parallel_server, "/v1/merge/artifacts")["data"]}) == 2


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_the_references(parallel_server, reference, exported, prompts, name):  # noqa: F811
    texts = [item["prompt"] for item in prompts[::40]]
    for part in (texts[::2], texts[1::2]):
        difference = largest_difference(parallel_server, reference, exported[name], name, part)
        assert difference <= LIMIT, f"{name}: largest |Δ logprob| {difference:.2e}"


def test_a_name_that_no_rank_has_met_is_ready_everywhere_after_its_first_request(parallel_server):
    body = {"model": "reverse", "prompt": "reverse: stone ->", "max_tokens": 8, "temperature": 0}
    answer = post(parallel_server, "/v1/completions", body)
    assert answer["choices"][0]["text"].strip().startswith("enots")
    workers = get(parallel_server, "/v1/merge/artifacts")["data"]
    assert all(any(row["name"] == answer["model"] for row in worker["artifacts"]) for worker in workers)
