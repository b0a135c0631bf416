# SPDX-License-Identifier: Apache-2.0
"""A slot is seen when it is filled and not before, and only requests take one: warming and pinning do not, and vLLM's own pins are
never used.
"""

import re
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.model_manager import LoRAModelManager

import vllm_merge
from tests.serving.played_server import SLOTS, played, recipe_file
from tests.serving.test_registered import manager, marker  # noqa: F401
from vllm_merge.serving import compat


def test_a_slot_that_is_being_filled_is_nobodys(manager):  # noqa: F811
    seen = []

    def fill(standing, slot):
        seen.append((slot, list(manager.lora_index_to_id), list(manager._active_adapters)))
        return True

    compat.wrap_activation(fill)
    for number in (7, 8):
        manager._registered_adapters[number] = marker(number)
        assert manager.activate_adapter(number)
    assert seen == [(0, [None, None], []), (1, [7, None], [7])], "while a slot is filled it has no number"
    assert manager.lora_index_to_id == [7, 8]


def test_a_full_house_is_left_to_vllm(manager, monkeypatch):  # noqa: F811
    """Which adapter has to leave its slot is vLLM's to decide, and ours is filled in when one is free."""
    asked = []
    monkeypatch.setattr(LoRAModelManager, "activate_adapter", lambda self, number: asked.append(number))
    compat.wrap_activation(lambda standing, slot: True)
    for number in (7, 8, 9):
        manager._registered_adapters[number] = marker(number)
        manager.activate_adapter(number)
    assert asked == [9]
    assert manager.lora_index_to_id == [7, 8]


def test_warming_and_pinning_take_no_slot(tmp_path):
    async def scenario(server):
        api = server.apis[0]
        slots = server.engine._manager.slots
        for name in ("m0", "m1"):
            assert (await api.admin("POST", f"artifacts/{name}/warm")).status_code == 200
        assert (await api.admin("POST", "artifacts/m2/pin")).status_code == 200
        assert len(server.service.store.describe()["artifacts"]) == 3, "all are in the cache"
        assert slots == [None] * SLOTS
        await api.ask("m0")
        assert [held is not None for held in slots].count(True) == 1, "a request takes one"

    played(scenario, recipe_file(tmp_path / "files"))


def test_vllms_own_pins_are_never_used():
    """They end the engine when slots run out."""
    called = re.compile(r"\.\s*(pin_lora|pin_adapter|add_lora|remove_lora)\b")
    sources = list(Path(vllm_merge.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    assert [path.name for path in sources if called.search(path.read_text())] == []
    assert called.search("engine.pin_lora(1)")
