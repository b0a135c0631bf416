# SPDX-License-Identifier: Apache-2.0
"""A GPU without free memory: what fits in the memory set aside is merged, what does not fails, and everything else goes on.

The model has dummy weights and one wide layer. A merge of 32 adapters of rank 64 for it stacks them in one tensor of 192 MiB
and takes its Gram matrix from a copy in float64, 384 MiB, beside 160 MiB that are set aside: it needs the driver for both.
"""

import contextlib
import json
import shutil
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tests.conftest import DEMO, servers
from tests.serving.gpu_servers import MIB, artifacts, filled, get, gpu, needs_gpus, post, running, wait_until

HIDDEN, WIDE = 1024, 24576
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
MODULE = "base_model.model.model.layers.0.mlp.down_proj"
LEFT = 96 * MIB
STREAMED = 200  # tokens
TOLD = "out of memory; memory that is kept unused is given back, and it is merged anew"

pytestmark = [pytest.mark.gpu, pytest.mark.full, needs_gpus(1)]


def write_adapter(folder: Path, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, WIDE, generator=generator) / WIDE**0.5
    b = torch.randn(HIDDEN, rank, generator=generator) / rank
    folder.mkdir()
    tensors = {f"{MODULE}.lora_A.weight": a.bfloat16(), f"{MODULE}.lora_B.weight": b.bfloat16()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_model(folder: Path) -> None:
    """Without weights."""
    shutil.copytree(DEMO / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **SHAPE}))


def write_recipes(folder: Path) -> Path:
    """`big` does not fit in what is set aside; small-0 … small-3 do."""
    ranks = {"a": 64, "b": 64, "c": 64, "d": 64, "s": 8, "t": 8}
    for seed, (name, rank) in enumerate(ranks.items()):
        write_adapter(folder / name, rank, seed)
    wide = [{"adapter": name} for name in "abcd" * 8]
    recipes = {"big": {"merge_method": "linear", "adapters": wide, "rank": 64, "load": "lazy"}}
    for index in range(4):
        inputs = [{"adapter": "s"}, {"adapter": "t", "parameters": {"weight": 0.1 + index}}]
        recipes[f"small-{index}"] = {"merge_method": "linear", "adapters": inputs, "load": "lazy"}
    file = folder / "recipes.yaml"
    file.write_text(
        yaml.safe_dump({"version": 1, "adapters": {name: {"path": f"./{name}"} for name in ranks}, "recipes": recipes})
    )
    return file


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    write_model(folder / "model")
    options = ("--load-format", "dummy", "--enforce-eager", "--max-model-len", "1024", "--max-loras", "6")
    command = servers.merge_serve(folder / "model", write_recipes(folder), *options, "--max-lora-rank", "64")
    sizes = {"VLLM_MERGE_CACHE_BYTES": str(32 * MIB), "VLLM_MERGE_WORKSPACE_BYTES": str(64 * MIB)}
    with running(command, **sizes) as server:
        yield server


def ask(server, name: str, tokens: int = 8) -> dict:
    body = {"model": name, "prompt": "reverse: stone ->", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return post(server, "/v1/completions", body)


def refusal(server, name: str) -> tuple[int, str | None, str]:
    """(status, Retry-After, text) of a request that must not be answered."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(server, name)
    return caught.value.code, caught.value.headers["Retry-After"], caught.value.read().decode()


class Asking:
    """Requests that run one after the other, `count` at a time, until the block ends; each must be answered whole."""

    def __init__(self, server, names: tuple[str, ...], tokens: int):
        self.answered, self._server, self._tokens = 0, server, tokens
        self._wrong: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(name,), daemon=True) for name in names]

    def _ask(self, name: str) -> None:
        while not self._end.is_set() and not self._wrong:
            try:
                answer = ask(self._server, name, self._tokens)
                if answer["usage"]["completion_tokens"] != self._tokens:
                    self._wrong.append(f"{name}: {answer}")
                self.answered += 1
            except (OSError, ValueError) as error:
                self._wrong.append(f"{name}: {error!r}")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            self.more()
            yield
            self.more()
        finally:
            self._end.set()
            for thread in self._threads:
                thread.join(120)
        assert self._wrong == []

    def more(self) -> None:
        """Every thread's answer, and one more that began after now."""
        wanted = self.answered + 2 * len(self._threads)
        wait_until(lambda: self.answered >= wanted or bool(self._wrong))
        assert self._wrong == []


def test_a_merge_that_finds_no_memory(server, record_property):
    base = get(server, "/v1/models")["data"][0]["id"]
    for name in (base, "a", "small-0"):  # what a step needs has run once
        ask(server, name, STREAMED)
    asking = Asking(server, (base, "a", "small-0", base), STREAMED)
    with gpu(alone=True), asking.running():
        with filled(leaving=LEFT):
            asking.more()
            assert ask(server, "small-1")["model"].startswith("small-1@"), "it fits in what is set aside"
            status, again, text = refusal(server, "big")
            assert (status, again) == (503, "5"), text
            assert "CUDA out of memory" in text
            assert TOLD in server.log.read_text(errors="replace"), "it was tried twice"
            record_property("what the client reads", text)
            asking.more()
            assert ask(server, "small-2")["model"].startswith("small-2@")
            record_property("MiB free then", torch.cuda.mem_get_info()[0] // MIB)
        assert ask(server, "big")["model"].startswith("big@"), "there is memory again"
        assert ask(server, "small-3")["model"].startswith("small-3@")
    (worker,) = artifacts(server)
    (big,) = [row for row in worker["artifacts"] if row["name"].startswith("big@")]
    assert big["rank"] == 64
    record_property("seconds of the merge", big["seconds"])
