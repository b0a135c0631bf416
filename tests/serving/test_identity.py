# SPDX-License-Identifier: Apache-2.0
import hashlib

import pytest

from vllm_merge.serving.identity import FIRST_ID, lora_id, lora_path, parse_path

DIGEST = hashlib.sha256(b"a recipe").hexdigest()


def test_ids_are_int32_beyond_vllms_own_and_made_of_the_digest():
    ids = {lora_id(hashlib.sha256(str(i).encode()).hexdigest()) for i in range(2000)}
    assert len(ids) == 2000
    assert all(FIRST_ID <= i < 2**31 for i in ids)
    assert lora_id(DIGEST) == FIRST_ID + (int(DIGEST[:8], 16) >> 2)


def test_another_attempt_gives_another_id_and_path():
    assert len({lora_id(DIGEST, attempt) for attempt in range(50)}) == 50
    assert lora_path(DIGEST, 0) != lora_path(DIGEST, 1)


@pytest.mark.parametrize("attempt", [0, 3])
def test_paths_name_their_digest(attempt):
    assert parse_path(lora_path(DIGEST, attempt)) == DIGEST


@pytest.mark.parametrize(
    "path",
    [
        "/adapters/sql",
        "vllm-merge://",
        f"vllm-merge://{DIGEST}",
        f"vllm-merge://{DIGEST}/../0",
        f"x{lora_path(DIGEST)}",
    ],
)
def test_other_paths_are_not_ours(path):
    assert parse_path(path) is None
