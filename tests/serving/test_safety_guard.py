# SPDX-License-Identifier: Apache-2.0
"""A recipe whose measured safety is under its floor has no artifact, says why, and no experiment promotes it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import DEMO
from tests.serving.facts import FACTS
from vllm_merge.adapters.catalogue import Catalogue
from vllm_merge.serving.control.names import resolve_names

RECIPE = "{{merge_method: linear, adapters: [{{adapter: add}}]{more}}}"


def resolved(tmp_path: Path, safety: str):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"version: 1\nadapters: {{add: {{path: {DEMO / 'adapters' / 'add'}}}}}\nrecipes:\n"
        f"  plain: {RECIPE.format(more='')}\n  r: {RECIPE.format(more=f', safety: {safety}')}\n"
        "  of-r: {merge_method: linear, adapters: [{adapter: r}]}\naliases: {best: r}\n",
        encoding="utf-8",
    )
    return resolve_names(path, FACTS, Catalogue(), {})


@pytest.mark.parametrize("name", ["r", "best"])
def test_a_refused_recipe_has_no_artifact(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    found = resolved(tmp_path, "{floor: 0.9, score: 0.5}")
    assert found.names[name].digest is None
    assert re.match(r"recipe 'r' is refused: its safety score of 0.5 is under its floor", found.names[name].reason)
    assert found.names["plain"].digest is not None
    assert "its safety score of 0.5 is under its floor of 0.9" in caplog.text


def test_the_score_changes_no_digest(tmp_path: Path) -> None:
    good = resolved(tmp_path, "{floor: 0.9, score: 0.95}")
    assert good.names["r"].digest == good.names["plain"].digest is not None
    assert not good.names["r"].reason


@pytest.mark.parametrize("serve", ["r", "best"])
def test_an_arm_that_is_refused_is_not_promoted(tmp_path: Path, serve: str) -> None:
    """The route says why, before anything is decided."""
    pytest.importorskip("vllm")
    from vllm_merge.serving.routes.experiment_routes import Promotion, promote
    from vllm_merge.serving.routes.route_errors import RouteError

    arms = {"new": SimpleNamespace(serve=serve), "old": SimpleNamespace(serve="plain")}
    running = SimpleNamespace(experiment=SimpleNamespace(arms=arms))
    state = SimpleNamespace(
        trials=SimpleNamespace(running={"ab": running}), names=resolved(tmp_path, "{floor: 0.9, score: 0.5}")
    )
    published = SimpleNamespace(state=state)  # without a store, which a decision would need
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(vllm_merge_published=published)))
    with pytest.raises(RouteError, match=r"its safety score of 0.5 is under its floor of 0.9") as caught:
        asyncio.run(promote("ab", Promotion(arm="new"), request))
    assert caught.value.status == 422
    with pytest.raises(AttributeError, match="version"):  # the other arm gets as far as the decision
        asyncio.run(promote("ab", Promotion(arm="old"), request))
