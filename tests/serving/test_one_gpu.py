# SPDX-License-Identifier: Apache-2.0
"""One GPU: CUDA graphs, weights that are loaded anew, sleep of both levels. One server, which the tests use in this order.

Merges are compared with what vLLM's own LoRA makes of their exports, in the same server.
"""

import contextlib
import json
import shutil
import threading
import urllib.error
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import CONFIG, DEMO, servers
from tests.serving.gpu_servers import MIB, artifacts, get, gpu, needs_gpus, post, running, wait_until
from tests.serving.nearness import Answers, distance
from tests.serving.test_exactness import exported, served  # noqa: F401  (a fixture)

# Of rank 64, of a lower one, one that is merged when it is asked for.
MERGES = ("ties", "task-arithmetic", "knots-mean")
ROUNDING = 0.1  # nats: what sums of bfloat16 in another order may make
NOT_FOUND = "There is no module or parameter named"
SEEN = 0.5  # nats: what makes a difference at least

pytestmark = [pytest.mark.gpu, pytest.mark.full, pytest.mark.timeout(200, func_only=True), needs_gpus(1)]


@pytest.fixture(scope="module")
def texts(prompts) -> list[str]:
    return [item["prompt"] for item in prompts[::40]]


@pytest.fixture(scope="module")
def server(tmp_path_factory, exported):  # noqa: F811
    """With CUDA graphs and sleep mode; `.model` is its model, `ties-exported` and so on are vLLM's own adapters."""
    model = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(DEMO / "model", model)
    theirs = [json.dumps({"name": f"{name}-exported", "path": exported[name]}) for name in MERGES]
    options = ("--max-model-len", "256", "--max-loras", "6", "--max-lora-rank", "64", "--enable-sleep-mode")
    command = servers.merge_serve(model, CONFIG, *options, "--lora-modules", *theirs)
    with running(command) as server:
        server.model, server.reloads = model, False
        yield server


def answers(server, texts: list[str], names: tuple[str, ...] = MERGES) -> dict[str, Answers]:
    return {name: served(server, name, texts) for name in names}


def assert_same(some: dict[str, Answers], others: dict[str, Answers], record_property=lambda name, value: None) -> None:
    for name in some:
        found = distance(some[name], others[name])
        record_property(f"largest |Δ log p| of {name}", round(found, 4))
        assert found <= ROUNDING, f"{name}: largest |Δ log p| {found:.4f}"


def exports(server, texts: list[str]) -> dict[str, Answers]:
    """What vLLM's own LoRA answers."""
    return {name: served(server, f"{name}-exported", texts) for name in MERGES}


def test_graphs(server, texts, record_property):
    log = server.log.read_text(errors="replace")
    assert "enforce_eager=False" in log
    assert "Graph capturing finished" in log
    with gpu():
        ours = answers(server, texts)
        assert_same(ours, exports(server, texts), record_property)
    assert distance(ours["ties"], ours["knots-mean"]) > SEEN, "the bound tells merges apart"


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


@contextlib.contextmanager
def asleep(server, level: int, last: str = "") -> Iterator[int]:
    """vLLM sleeps in the block, and nobody else has the GPU, whose free memory vLLM watches: gives the bytes free before.

    last: what is woken after the block.
    """
    wait_until(lambda: not any(row["leases"] for row in held(server)))
    with gpu(alone=True):
        free = free_bytes()
        post(server, f"/sleep?level={level}")
        try:
            assert get(server, "/is_sleeping") == {"is_sleeping": True}
            yield free
        finally:
            post(server, f"/wake_up{last}")
    assert get(server, "/is_sleeping") == {"is_sleeping": False}


def held(server) -> list[dict]:
    """What the worker has on the device."""
    (worker,) = artifacts(server)
    return worker["artifacts"]


def test_sleep_and_wake(server, texts, record_property):
    """Level 1: weights go to the host and back. Who asks for a merge meanwhile gets it afterwards."""
    before = answers(server, texts)
    assert held(server)
    found: dict[str, Answers] = {}
    asking = threading.Thread(target=lambda: found.update(answers(server, texts, ("knots-mean",))), daemon=True)
    with asleep(server, 1) as free:
        wait_until(lambda: not held(server))
        freed = free_bytes() - free
        asking.start()
        asking.join(3)
        assert asking.is_alive()
        assert not found
    asking.join(100)
    assert_same(found, {"knots-mean": before["knots-mean"]})
    assert_same(answers(server, texts), before, record_property)
    record_property("MiB that sleep gave back", freed // MIB)
    assert freed > 768 * MIB, "vLLM's KV cache, 256 MiB, and most of what is set aside for merges, 768 MiB"


def test_weights_that_are_loaded_anew(server, texts, record_property):
    """The same: the same answers. Others: those with the same merges, which are changes."""
    before = answers(server, texts)
    with gpu():
        reload_weights(server)
        server.reloads = True
        assert_same(answers(server, texts), before)
        file = server.model / "model.safetensors"
        weights = {key: t * 1.5 if key.endswith("o_proj.weight") else t for key, t in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        reload_weights(server)
        post(server, "/reset_prefix_cache")
        ours = answers(server, texts)
        assert_same(ours, exports(server, texts), record_property)
    for name in MERGES:
        assert distance(ours[name], before[name]) > SEEN, name


def reload_weights(server) -> None:
    try:
        post(server, "/collective_rpc", {"method": "reload_weights"})
    except urllib.error.HTTPError:
        # Before its LoRA layers had load_weights of their own, vLLM did not find the layers in them; the model is lost then.
        if NOT_FOUND not in server.log.read_text(errors="replace"):
            raise
        pytest.xfail("this vLLM loads no weights anew where LoRA is on")


def test_sleep_that_throws_the_weights_away(server, texts, record_property):
    """Level 2: they are loaded anew, between waking their memory and waking the KV cache's."""
    if not server.reloads:
        pytest.skip("this vLLM loads no weights anew where LoRA is on")
    before = answers(server, texts)
    with asleep(server, 2, last="?tags=kv_cache"):
        post(server, "/wake_up?tags=weights")
        reload_weights(server)
        assert get(server, "/is_sleeping") == {"is_sleeping": True}, "the KV cache still does"
    assert_same(answers(server, texts), before, record_property)
