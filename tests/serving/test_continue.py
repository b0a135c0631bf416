# SPDX-License-Identifier: Apache-2.0
"""A server goes on from an earlier result: of a recipe of the file, and of a saved folder without the earlier adapters."""

import shutil

import pytest

from tests.conftest import DEMO, servers
from vllm_merge import MergedAdapter, merge
from vllm_merge.adapters.factors import Adapter

PROMPTS = ("upper: stone ->", "sort: stone ->", "add: 12+31 ->")


@pytest.mark.server
@pytest.mark.full
def test_a_served_recipe_continues(tmp_path):
    pytest.importorskip("vllm")
    from openai import OpenAI

    upper, sort, add = (Adapter.from_peft(DEMO / "adapters" / name) for name in ("upper", "sort", "add"))
    arguments = {"merge_method": "opcm", "parameters": {"lambda": 1.6}}
    merge([upper, sort], **arguments, rank="lossless").save_pretrained(tmp_path / "saved")
    shutil.copytree(DEMO / "adapters" / "add", tmp_path / "add")
    for name in ("upper", "sort"):
        shutil.copytree(DEMO / "adapters" / name, tmp_path / name)
    merge([upper, sort, add], **arguments).save_pretrained(tmp_path / "whole")
    parameters = "parameters: {lambda: 1.6}"
    (tmp_path / "r.yaml").write_text(f"""\
version: 1
adapters:
  upper: {{path: ./upper}}
  sort: {{path: ./sort}}
  add: {{path: ./add}}
  saved: {{path: ./saved}}
  whole: {{path: ./whole}}
recipes:
  first: {{merge_method: opcm, adapters: [{{adapter: upper}}, {{adapter: sort}}], rank: lossless, load: lazy}}
  of-recipe: {{merge_method: opcm, continue: first, adapters: [{{adapter: add}}], {parameters}, load: lazy}}
  of-folder: {{merge_method: opcm, continue: saved, adapters: [{{adapter: add}}], {parameters}, load: lazy}}
  of-nothing: {{merge_method: opcm, continue: upper, adapters: [{{adapter: add}}], load: lazy}}
""")
    command = servers.merge_serve(DEMO / "model", tmp_path / "r.yaml", "--max-lora-rank", "64", "--max-loras", "4")
    with (
        servers.running(command) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):

        def answers(model):
            asked = [
                client.completions.create(model=model, prompt=p, max_tokens=8, temperature=0, stop=["\n"])
                for p in PROMPTS
            ]
            return [answer.choices[0].text.strip() for answer in asked]

        expected = answers("whole")
        assert answers("of-recipe") == answers("of-folder") == expected
        assert sum(text in ("STONE", "enost", "43") for text in expected) >= 2
        (row,) = [r for r in client.get("/merge/recipes", cast_to=dict)["data"] if r["name"] == "of-nothing"]
        assert "recipes.of-nothing.continue: adapter 'upper' carries no state" in str(row)
    assert MergedAdapter.from_pretrained(tmp_path / "saved").report.continuation["order"] == ["upper", "sort"]
