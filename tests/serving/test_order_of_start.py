# SPDX-License-Identifier: Apache-2.0
"""No merge begins before vLLM has measured its memory, warmed up and captured its graphs, and none is missing when it is ready."""

import yaml

from tests.conftest import CONFIG

INITIALISED = "init engine (profile, create kv cache, warmup model) took"
MERGED = "] merged "


def test_merges_begin_when_the_engine_is_up(demo_server):
    before, after = demo_server.log.read_text(errors="replace").split(INITIALISED, 1)
    assert MERGED not in before
    recipes = yaml.safe_load(CONFIG.read_text())["recipes"]
    eager = [name for name, recipe in recipes.items() if recipe.get("load", "eager") == "eager"]
    assert eager
    assert [name for name in eager if f"{MERGED}{name}@" not in after] == []
