# SPDX-License-Identifier: Apache-2.0
import gc

import pytest
import torch

from vllm_merge.errors import MergeError
from vllm_merge.serving.memory.residency import ArtifactStore, OutOfBudget, ResidentArtifact

SIZE = 2 * 4 * 100 * 4  # bytes of one artifact below


def artifact(digest: str) -> ResidentArtifact:
    storage = torch.zeros(800)
    factors = {"m": (storage[:400].view(4, 100), storage[400:].view(100, 4))}
    return ResidentArtifact(digest, f"{digest}@0", storage, factors, None, "", 0.0)


def test_least_recently_used_goes_first_and_bytes_follow():
    store = ArtifactStore(3 * SIZE)
    for digest in "abc":
        store.insert(artifact(digest))
    assert store.get("a") is not None  # now b is the oldest
    store.insert(artifact("d"))
    assert store.get("b") is None
    assert {row["digest"] for row in store.describe()["artifacts"]} == {"a", "c", "d"}
    assert store.describe()["bytes"] == 3 * SIZE


def test_a_leased_artifact_is_never_evicted():
    store = ArtifactStore(2 * SIZE)
    store.insert(artifact("a"))
    store.lease("a")
    for digest in "bcd":
        store.insert(artifact(digest))
    assert store.get("a") is not None
    assert not store.evict("a")
    store.release("a")
    assert store.evict("a")
    assert store.get("a") is None


def test_what_does_not_fit_is_refused_and_nothing_is_kept_of_it():
    store = ArtifactStore(SIZE)
    store.insert(artifact("a"))
    store.lease("a")
    with pytest.raises(OutOfBudget, match="VLLM_MERGE_CACHE_BYTES"):
        store.insert(artifact("b"))
    with pytest.raises(MergeError, match="the budget is"):
        store.make_room("giant", SIZE + 1)
    assert store.get("b") is None
    assert store.get("a") is not None
    assert store.describe()["bytes"] == SIZE


def test_nothing_is_evicted_in_vain():
    store = ArtifactStore(3 * SIZE)
    for digest in "abc":
        store.insert(artifact(digest))
    store.lease("b")
    store.lease("c")
    with pytest.raises(OutOfBudget):
        store.make_room("two", 2 * SIZE)
    assert store.peek("a") is not None


def test_an_evicted_artifact_that_vllm_still_refers_to_counts_and_comes_back_without_a_merge():
    store = ArtifactStore(2 * SIZE)
    vllms = artifact("a")
    store.insert(vllms)
    assert store.evict("a")
    assert store.describe()["bytes"] == SIZE
    assert store.get("a") is vllms
    assert store.evict("a")
    del vllms
    gc.collect()
    assert store.get("a") is None
    assert store.describe()["bytes"] == 0


def test_what_is_evicted_is_handed_down_before_its_memory_is_given_back():
    handed = []
    store = ArtifactStore(2 * SIZE, demote=lambda artifact: handed.append((artifact.digest, store.describe()["bytes"])))
    for digest in "abc":
        store.insert(artifact(digest))
    assert handed == [("a", 2 * SIZE)]
    assert store.describe()["bytes"] == 2 * SIZE
    assert store.evict("b")
    assert [digest for digest, _ in handed] == ["a", "b"]


def test_pins_stay_and_never_leave_no_room():
    store = ArtifactStore(3 * SIZE)
    for digest in "ab":
        store.insert(artifact(digest))
        store.pin(digest)
    store.insert(artifact("c"))
    with pytest.raises(OutOfBudget, match=r"no room for an artifact of .*VLLM_MERGE_CACHE_BYTES"):
        store.pin("c")
    store.pin("a")  # once more changes nothing
    for digest in "defg":
        store.insert(artifact(digest))
    assert {row["digest"] for row in store.describe()["artifacts"] if row["pinned"]} == {"a", "b"}
    assert not store.evict("a")
    assert store.unpin("a")
    assert not store.unpin("a")
    assert store.evict("a")
    with pytest.raises(MergeError, match="not in the cache; warm it first"):
        store.pin("a")
    store.pin("g")


def test_what_vllm_keeps_for_itself_is_within_the_budget():
    theirs = 0
    store = ArtifactStore(3 * SIZE, others=lambda: theirs)
    for digest in "abc":
        store.insert(artifact(digest))
    theirs = SIZE
    store.insert(artifact("d"))
    facts = store.describe()
    assert {row["digest"] for row in facts["artifacts"]} == {"c", "d"}
    assert facts["bytes"] + facts["others_bytes"] == store.budget_bytes
    theirs = 3 * SIZE
    with pytest.raises(OutOfBudget):
        store.insert(artifact("e"))


def test_what_something_still_refers_to_is_not_taken_for_free():
    store = ArtifactStore(2 * SIZE)
    held = artifact("a")
    store.insert(held)
    store.insert(artifact("b"))
    store.insert(artifact("c"))
    assert store.describe()["bytes"] == 2 * SIZE, "b had to go as well"
    assert {row["digest"] for row in store.describe()["artifacts"]} == {"a", "c"}
    store.lease("c")
    with pytest.raises(OutOfBudget):
        store.insert(artifact("d"))
