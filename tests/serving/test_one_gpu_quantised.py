# SPDX-License-Identifier: Apache-2.0
"""Merges on quantised bases on one GPU, in offline engines with --enforce-eager that start side by side.

Each is compared with what vLLM's own LoRA makes of the same bytes, and of a merge on the CPU.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import CONFIG, DEMO
from tests.serving.gpu_servers import ENVIRONMENT, gpu, needs_gpus
from tests.serving.nearness import HALF, Answers, distance, in_another_basis, judge
from tests.serving.quantised import FORMATS, quantise
from tests.serving.test_exactness import exported  # noqa: F401  (a fixture)

MERGES = ("ties", "task-arithmetic", "knots-mean")
FP8 = "compressed-tensors FP8"  # weights; inputs token by token
PROGRAM = Path(__file__).with_name("two_ways.py")

pytestmark = [pytest.mark.gpu, pytest.mark.full, needs_gpus(1)]


def write_base(form: str, folder: Path) -> None:
    """The demo's model in a form."""
    if form != FP8:
        return quantise(DEMO / "model", folder, form)
    quantise(DEMO / "model", folder, "compressed-tensors W8A8")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    settings = config["quantization_config"]
    settings["format"] = "float-quantized"
    for group in settings["config_groups"].values():
        group["weights"]["type"] = group["input_activations"]["type"] = "float"
    path.write_text(json.dumps(config))
    original = load_file(DEMO / "model" / "model.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("_proj.weight")]:
        scale = original[key].float().abs().amax(1, keepdim=True).clamp_min(1e-8) / torch.finfo(torch.float8_e4m3fn).max
        tensors |= {key: (original[key].float() / scale).to(torch.float8_e4m3fn), f"{key}_scale": scale}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return None


FORMS = (*FORMATS, FP8)


@pytest.fixture(scope="module")
def engines(tmp_path_factory, exported, prompts) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:  # noqa: F811
    """For each form a program that runs, and the folder of what it prints."""
    environment = {**os.environ, **ENVIRONMENT, "VLLM_MERGE_CONFIG": str(CONFIG)}
    texts = json.dumps([item["prompt"] for item in prompts[::40]])
    exports = [f"{name}={exported[name]}" for name in MERGES]
    for name in MERGES:
        turned = tmp_path_factory.mktemp("turned") / name
        in_another_basis(Path(exported[name]), turned)
        exports.append(f"{name}/turned={turned}")
    started = {}
    with gpu():
        for form in FORMS:
            folder = tmp_path_factory.mktemp("engine")
            write_base(form, folder / "base")
            with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
                command = [sys.executable, str(PROGRAM), str(folder / "base"), "bfloat16", texts, *exports]
                process = subprocess.Popen(command, env=environment, stdout=out, stderr=err, start_new_session=True)
            started[form] = process, folder
        yield started
        for process, _ in started.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def printed(process: subprocess.Popen[bytes], folder: Path) -> dict[str, dict[str, Answers]]:
    """What the program answers, as soon as it does."""
    deadline = time.monotonic() + 400
    while True:
        ended = process.poll() is not None
        lines = [line for line in (folder / "out").read_text().splitlines(keepends=True) if line.startswith('{"ours"')]
        if lines and lines[0].endswith("\n"):
            break
        assert not ended, (folder / "err").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return {
        whose: {name: (sequences, list(map(torch.tensor, values))) for name, (sequences, values) in answers.items()}
        for whose, answers in json.loads(lines[0]).items()
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_merge_on_a_quantised_base_is_what_vllm_makes_of_its_bytes(engines, form, record_property):
    found = printed(*engines[form])
    turned = {name: found["theirs"][f"{name}/turned"] for name in MERGES}
    wrong = judge(found["ours"], found["again"], found["same"], found["theirs"], turned, record_property)
    for name in MERGES:
        if distance(found["ours"][name], found["base"][""]) <= 10 * HALF:
            wrong.append(f"{name}: hardly anything but the base model")
    assert not wrong, "\n".join(wrong)
