# SPDX-License-Identifier: Apache-2.0
"""Merges where the base model is not the plain one: quantised, not eager, its weights reloaded, vLLM told to sleep.

Each test starts servers of its own. docs/architecture/compatibility.md says what of it ran where.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import CONFIG, DEMO, servers
from tests.serving.nearness import HALF, distance
from tests.serving.quantised import FORMATS, quantise
from tests.serving.test_exactness import LIMIT, Reference, exported, reference, served  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.full, pytest.mark.server]
pytest.importorskip("vllm", reason="vLLM is not installed")

# Of rank 64, of a lower one, one that is merged when it is asked for.
MERGES = ("ties", "task-arithmetic", "knots-mean")
OPTIONS = ("--max-loras", "4", "--max-lora-rank", "64")
SEEN = 0.05  # nats: what makes a difference at least
# Formats that vLLM's CPU build runs, but not with --enable-lora, and what it says.
WITHOUT_LORA = {"compressed-tensors W8A8": "'NoneType' object has no attribute 'device'"}


@pytest.fixture(scope="module")
def texts(prompts: list[dict[str, str]]) -> list[str]:
    return [item["prompt"] for item in prompts[::40]]


def plain(base: Path) -> list[str]:
    """vLLM's own server."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    return [*command, "--enable-lora", *OPTIONS]


def log_of(error: RuntimeError) -> str:
    """The whole log of a server that ended."""
    return Path(re.search(r"the end of (\S+):", str(error))[1]).read_text(errors="replace")


def post(server: servers.Server, path: str, body: dict[str, object] | None = None) -> int:
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(server.url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        return int(reply.status)


def options(**changes: str) -> tuple[str, ...]:
    """The CPU's options with other values: `dtype="bfloat16"`."""
    given = list(servers.CPU_OPTIONS)
    for name, value in changes.items():
        given[given.index(f"--{name}") + 1] = value
    return tuple(given)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in WITHOUT_LORA])
def test_a_merge_on_a_quantised_base_is_what_vllm_makes_of_its_export(form, exported, texts, tmp_path):  # noqa: F811
    """In one engine, by the offline `LLM` class; four bits need bfloat16 on the CPU."""
    base = tmp_path / "base"
    quantise(DEMO / "model", base, form)
    program = [sys.executable, str(Path(__file__).with_name("two_ways.py")), str(base), "bfloat16", json.dumps(texts)]
    environment = {**os.environ, **servers.CPU_ENVIRONMENT, "VLLM_MERGE_CONFIG": str(CONFIG)}
    done = subprocess.run(
        [*program, *(f"{name}={exported[name]}" for name in MERGES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = next(line for line in done.stdout.splitlines() if line.startswith('{"ours"'))  # beside vLLM's own lines
    found = {
        whose: {name: (sequences, list(map(torch.tensor, values))) for name, (sequences, values) in answers.items()}
        for whose, answers in json.loads(printed).items()
    }
    for name in MERGES:
        assert distance(found["ours"][name], found["same"][name]) <= LIMIT, f"{name}: the same bytes"
        assert distance(found["ours"][name], found["theirs"][name]) <= HALF, name
        assert distance(found["ours"][name], found["base"][""]) > 10 * HALF, name


@pytest.mark.parametrize("form", WITHOUT_LORA)
def test_what_vllm_has_no_lora_for(form, tmp_path, monkeypatch):
    """Without this plugin. Where this fails vLLM has learned it, and the format belongs to those above."""
    monkeypatch.setattr(servers, "CPU_OPTIONS", options(dtype="bfloat16"))
    quantise(DEMO / "model", tmp_path / "base", form)
    with (
        pytest.raises(RuntimeError, match="ended with") as caught,
        servers.running(plain(tmp_path / "base"), {"VLLM_PLUGINS": "none"}) as server,
    ):
        server.stop()
    assert WITHOUT_LORA[form] in log_of(caught.value)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory):
    """A server with vLLM's routes for developers, of a copy of the model, `.model`, whose weights a test may change."""
    model = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(DEMO / "model", model)
    with servers.running(servers.merge_serve(model, CONFIG, *OPTIONS), {"VLLM_SERVER_DEV_MODE": "1"}) as server:
        server.model = model
        yield server


def test_reloaded_weights_leave_merges_right(open_server, reference, exported, texts):  # noqa: F811
    """The same weights: the same answers. Other weights: those weights with the same merges, which are changes."""
    before = {name: served(open_server, name, texts) for name in MERGES}
    post(open_server, "/collective_rpc", {"method": "reload_weights"})
    for name in MERGES:
        assert distance(served(open_server, name, texts), before[name]) <= LIMIT
    file = open_server.model / "model.safetensors"
    weights = {key: t * 1.1 if key.endswith("o_proj.weight") else t for key, t in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    post(open_server, "/collective_rpc", {"method": "reload_weights"})
    post(open_server, "/reset_prefix_cache")
    changed = Reference()
    changed.base = lambda: _with(reference.base(), weights)
    for name in MERGES:
        sequences, values = served(open_server, name, texts)
        expected = changed.logprobs(changed.load(exported[name]), sequences)
        assert distance((sequences, values), (sequences, expected)) <= LIMIT, name
        assert distance((sequences, values), before[name]) > SEEN, name


def _with(model, weights):
    missing = model.load_state_dict({key: tensor.float() for key, tensor in weights.items()}, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"])  # which is tied
    return model


def test_answers_after_sleep_are_those_before(open_server, texts):
    """On the CPU vLLM ignores it, and says so in its log; the scheduler sleeps."""
    before = {name: served(open_server, name, texts) for name in MERGES}
    post(open_server, "/sleep?level=1")
    post(open_server, "/wake_up")
    for name in MERGES:
        assert distance(served(open_server, name, texts), before[name]) <= LIMIT


def test_without_enforce_eager(exported, reference, texts, monkeypatch):  # noqa: F811
    """With LoRA vLLM's CPU build compiles nothing all the same. Where this fails it has learned it: then the table has a line more."""
    monkeypatch.setattr(servers, "CPU_OPTIONS", tuple(o for o in servers.CPU_OPTIONS if o != "--enforce-eager"))
    with servers.running(servers.merge_serve(DEMO / "model", CONFIG, *OPTIONS), seconds=600) as server:
        answers = {name: served(server, name, texts) for name in MERGES}
        configured = next(
            line for line in server.log.read_text().splitlines() if "Initializing a V1 LLM engine" in line
        )
    assert "enforce_eager=False" in configured
    if not torch.cuda.is_available():
        assert "CompilationMode.NONE" in configured
    for name, (sequences, values) in answers.items():
        expected = reference.logprobs(reference.load(exported[name]), sequences)
        assert distance((sequences, values), (sequences, expected)) <= LIMIT, name


def test_sleep_mode_is_refused_by_vllm_on_the_cpu():
    """Where this fails vLLM has learned it: then the CPU's column of the compatibility table has a line more."""
    if torch.cuda.is_available():
        pytest.skip("a GPU has it")
    command = servers.merge_serve(DEMO / "model", CONFIG, *OPTIONS, "--enable-sleep-mode")
    with pytest.raises(RuntimeError, match="ended with") as caught, servers.running(command) as server:
        server.stop()
    assert "Sleep mode is not supported on current platform" in log_of(caught.value)


def test_formats_are_what_they_say(tmp_path: Path):
    """What the quantised layers hold is the weight, to half a step of its scale."""
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    int8, _ = FORMATS["compressed-tensors W8A8"]
    parts = int8(weight)
    assert (parts["weight"] * parts["weight_scale"] - weight).abs().max() <= parts["weight_scale"].max() * 0.51
    int4, _ = FORMATS["compressed-tensors W4A16"]
    parts = int4(weight)
    nibbles = (parts["weight_packed"][..., None] >> (4 * torch.arange(8))) & 15
    values = (nibbles.reshape(32, 256) - 8) * parts["weight_scale"].repeat_interleave(128, 1)
    assert (values - weight).abs().max() <= parts["weight_scale"].max() * 0.51
