# SPDX-License-Identifier: Apache-2.0
"""What a worker sets aside on its device is what the settings say, and `plan --server` with them."""

import pytest

from tests.serving.test_worker import merges, serve  # noqa: F401
from vllm_merge.serving.settings import WorkerSettings
from vllm_merge.serving.worker import worker as worker_module


@pytest.mark.parametrize("changes", [{}, {"cache_bytes": 1 << 20}, {"workspace_bytes": 64 << 20, "cache_bytes": 7}])
def test_the_arena_takes_the_cache_and_the_room_for_merges(serve, monkeypatch, changes):  # noqa: F811
    taken = []

    class Arena(worker_module.Arena):
        def __init__(self, device, reserve_bytes):
            taken.append(reserve_bytes)
            super().__init__(device, reserve_bytes)

    monkeypatch.setattr(worker_module, "Arena", Arena)
    service = serve(**changes)
    settings = WorkerSettings.read()
    assert taken == [settings.cache_bytes + settings.merge_bytes_on(None)]
    assert service.store.budget_bytes == settings.cache_bytes == changes.get("cache_bytes", 4 << 30)
    assert service._sources.budget_bytes == settings.source_bytes
