# SPDX-License-Identifier: Apache-2.0
"""What vLLM keeps registered: never a tensor of ours, and what it keeps for itself is counted."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import AdapterLRUCache, LoRAModelManager

from vllm_merge.serving import compat

MODULE = "model.layers.0.mlp.down_proj"


class Layer:
    """Takes what is put into a slot."""

    def __init__(self):
        self.slots = {}

    def set_lora(self, index, a, b):
        self.slots[index] = (a.clone(), b.clone())

    def reset_lora(self, index):
        self.slots[index] = None


@pytest.fixture
def manager(monkeypatch):
    """vLLM's manager with one layer, two slots and room for 64 registered adapters, its activation wrapped by ours."""
    monkeypatch.setattr(LoRAModelManager, "activate_adapter", LoRAModelManager.activate_adapter)
    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager._registered_adapters = AdapterLRUCache(64, lambda number: None)
    manager._active_adapters = AdapterLRUCache(2, manager._deactivate_adapter)
    manager.lora_index_to_id = [None, None]
    manager.modules, manager.packed_modules = {MODULE: Layer()}, {}
    manager._is_moe = manager._is_3d_moe_model = manager.is_pooling_model = False
    return manager


def whole(number: int, value: float) -> LoRAModel:
    a, b = torch.full((4, 8), value), torch.full((8, 4), value)
    return LoRAModel(number, 4, {MODULE: LoRALayerWeights(MODULE, 4, 4, a, b)})


def marker(number: int) -> LoRAModel:
    worker = SimpleNamespace(device="cpu", lora_config=SimpleNamespace(lora_dtype=torch.float32))
    return compat.marker_lora_model(worker, number)


def test_where_vllm_fills_a_slot_itself_the_adapter_is_registered_for_that_moment_only(manager):
    seen = []

    def fill(standing, slot):
        seen.append((standing.id, slot))
        return whole(standing.id, float(standing.id)) if standing.id != 9 else None

    compat.wrap_activation(fill)
    for number in (1, 2):
        manager._registered_adapters[number] = marker(number)
        assert manager.activate_adapter(number)
        (a, _) = manager.modules[MODULE].slots[number - 1]
        assert torch.equal(a, torch.full((4, 8), float(number)))
        assert "vllm_merge" in manager._registered_adapters[number].loras, "the marker stands there again"
    assert manager.lora_index_to_id == [1, 2]
    assert seen == [(1, 0), (2, 1)]
    assert not manager.activate_adapter(1), "it is in its slot already"
    assert compat.registered_bytes(SimpleNamespace(_adapter_manager=manager, device="cpu")) == 2 * 4


def test_a_promise_that_was_broken_leaves_a_slot_that_changes_nothing(manager):
    compat.wrap_activation(lambda standing, slot: None)
    manager._registered_adapters[9] = marker(9)
    assert manager.activate_adapter(9)
    assert manager.modules[MODULE].slots == {0: None}


def test_every_tensor_that_vllm_registered_is_counted_once(manager):
    worker = SimpleNamespace(_adapter_manager=manager, device="cpu")
    assert compat.registered_bytes(worker) == 0
    for number in range(1, 65):
        manager._registered_adapters[number] = whole(number, 1.0)
    assert compat.registered_bytes(worker) == 64 * 2 * 4 * 8 * 4
    shared = torch.zeros(100, 100)
    manager._registered_adapters[1] = LoRAModel(
        1, 4, {MODULE: LoRALayerWeights(MODULE, 4, 4, [shared[:4], None], [shared[:, :4], None])}
    )
    assert compat.registered_bytes(worker) == 63 * 2 * 4 * 8 * 4 + 100 * 100 * 4
    assert compat.is_registered(worker, 64)
    assert not compat.is_registered(worker, 65)
