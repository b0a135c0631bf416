# SPDX-License-Identifier: Apache-2.0
"""vllm-merge osrm: what it writes, that PEFT trains on from it, the lossy variant, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Run, run  # noqa: F401  the fixture
from vllm_merge import Adapter

pytest.importorskip("transformers")
DEMO = Path(__file__).parents[2] / "examples/demo"


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    """Prompts of two tasks of the demo."""
    folders = [tmp_path / "data" / name for name in ("sort", "upper")]
    lines = [json.loads(line) for line in (DEMO / "eval.jsonl").read_text().splitlines()]
    for folder in folders:
        folder.mkdir(parents=True)
        mine = [json.dumps({"text": line["prompt"]}) for line in lines if line["task"] == folder.name]
        (folder / "train.jsonl").write_text("\n".join(mine[:12]))
    return folders


@pytest.mark.parametrize(("modules", "count"), [(("q_proj", "down_proj"), 10), (("all-linear",), 35)])
def test_starts_that_peft_trains_on(
    run: Run,  # noqa: F811
    tasks: list[Path],
    tmp_path: Path,
    modules: tuple[str, ...],
    count: int,
) -> None:
    out = tmp_path / "starts"
    code, printed, err = run(
        "osrm", DEMO / "model", "--tasks", *tasks, "--rank", 6, "--target-modules", *modules, "-o", out
    )
    assert (code, err) == (0, "")
    rows = [line.split() for line in printed.splitlines()]
    assert rows[0][:3] == ["task", "samples", "tokens"]
    assert [row[:2] for row in rows[1:3]] == [["sort", "12"], ["upper", "12"]]
    assert all(
        float(row[3]) < 0.1 * float(row[4]) for row in rows[1:3]
    )  # of the others' inputs far less than of its own
    assert rows[4] == f"wrote {out}, {count} modules of rank 6 for each of 2 tasks".split()
    facts = json.loads((out / "osrm.json").read_text())
    assert (facts["kind"], facts["lossy"], facts["variant"], facts["alpha"]) == (
        "initialisation",
        False,
        "covariance",
        12,
    )
    adapter = Adapter.from_peft(out / "sort")
    assert (len(adapter.factors), adapter.rank) == (count, 6)
    for pair in adapter.factors.values():
        assert pair.scaling == 2
        assert not pair.B.any()
        assert torch.allclose(pair.A @ pair.A.mT, torch.eye(6), atol=1e-5)
    _trains(out / "sort", adapter)


def _trains(folder: Path, before: Adapter) -> None:
    """PEFT loads the start, it changes nothing yet, and a step moves B."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    expected = base(input_ids=ids).logits.detach()
    model: Any = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    assert torch.equal(model(input_ids=ids).logits, expected)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * len(before.factors)
    a = next(parameter for name, parameter in trainable.items() if "layers.0.mlp.down_proj.lora_A" in name)
    assert torch.equal(a, before.factors["model.layers.0.mlp.down_proj"].A)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(trainable.values(), lr=0.1).step()
    assert not torch.equal(model(input_ids=ids).logits, expected)


def test_trained_adapters_are_projected_with_loss(run: Run, tasks: list[Path], tmp_path: Path) -> None:  # noqa: F811
    adapters = [DEMO / "adapters" / folder.name for folder in tasks]
    common = ("osrm", DEMO / "model", "--tasks", *tasks, "--target-modules", "all-linear", "--adapters", *adapters)
    code, printed, err = run(*common, "--rank", 32, "-o", tmp_path / "low", "--json")
    assert code == 0
    facts = json.loads(printed)
    assert (facts["kind"], facts["lossy"], "alpha" in facts) == ("post-hoc", True, False)
    assert "lossy" in facts["note"]
    kept = facts["tasks"]["sort"]["energy_kept"]
    before, after = (Adapter.from_peft(folder / "sort") for folder in (DEMO / "adapters", tmp_path / "low"))
    energy = [sum(float(f.delta().square().sum()) for f in adapter.factors.values()) for adapter in (before, after)]
    assert kept == pytest.approx(energy[1] / energy[0], rel=1e-3)
    assert 0 < kept < 0.5
    assert json.loads((tmp_path / "low" / "sort" / "osrm.json").read_text())["lossy"] is True
    code, printed, err = run(*common, "--rank", 256, "-o", tmp_path / "high")
    assert code == 0
    assert err.startswith("Warning: the adapters were projected after training, which is lossy")
    rows = [line.split() for line in printed.splitlines()]
    assert kept < 0.5 < float(rows[1][5].rstrip("%")) / 100 < 1  # nearly all directions there are


def test_help_has_examples(run: Run) -> None:  # noqa: F811
    code, printed, _ = run("osrm", "--help")
    assert code == 0
    assert "Examples:\n    vllm-merge osrm" in printed
    assert run("osrm", "base", "--tasks")[0] == 2


def test_refusals(run: Run, tasks: list[Path], tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    (tmp_path / "empty.jsonl").write_text("")
    same = tmp_path / "again" / "sort"
    same.mkdir(parents=True)
    (same / "train.jsonl").write_text('{"text": "sort: ba ->"}')
    q = ("--target-modules", "q_proj")
    cases: list[tuple[tuple[Any, ...], str]] = [
        (
            ("--tasks", tasks[0], "--rank", 4, *q),
            "--tasks: OSRM keeps each task out of the way of the others; give two",
        ),
        (("--tasks", *tasks, same, "--rank", 4, *q), "--tasks: 3 tasks, and more than one is called 'sort'"),
        (("--tasks", tasks[0], tmp_path / "empty.jsonl", "--rank", 4, *q), f"{tmp_path}/empty.jsonl: has no samples"),
        (
            ("--tasks", *tasks, "--rank", 4, "--target-modules", "query"),
            "--target-modules query: the model has no linear",
        ),
        (("--tasks", *tasks, "--rank", 257, *q), "--rank 257: model.layers.0.self_attn.q_proj has 256 inputs"),
        (("--tasks", *tasks, "--rank", 4, *q, "--variant", "median"), "--variant median: is not known; allowed are"),
        (("--tasks", *tasks, "--rank", 4, *q, "--alpha", 0), "--alpha 0: "),
        (("--tasks", *tasks, "--rank", 4, *q, "--device", "nowhere"), "--device nowhere: cannot be used here"),
        (
            ("--tasks", *tasks, "--rank", 4, *q, "--adapters", DEMO / "adapters/sort"),
            "--adapters: 1 adapters for 2 tasks",
        ),
        (
            ("--tasks", *tasks, "--rank", 4, *q, "--adapters", DEMO / "adapters/sort", DEMO / "adapters/upper"),
            "--adapters sort: changes model.layers.0.",
        ),
    ]
    for arguments, message in cases:
        code, printed, err = run("osrm", DEMO / "model", *arguments, "-o", out)
        assert (code, printed) == (2, ""), err
        assert err.startswith(f"Error: {message}"), err
        assert not out.exists()
    code, _, err = run("osrm", tmp_path, "--tasks", *tasks, "--rank", 4, *q, "-o", out)
    assert code == 2
    assert err.startswith(f"Error: {tmp_path}: transformers cannot load it")
