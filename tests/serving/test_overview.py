# SPDX-License-Identifier: Apache-2.0
"""The state of every name, from what the workers say of themselves."""

from types import SimpleNamespace

import pytest

from vllm_merge.serving.control.names import Name
from vllm_merge.serving.routes.overview import Current, describe_names

DIGEST = "d" * 64
ROW = {"digest": DIGEST, "rank": 8, "bytes": 64, "seconds": 0.5, "tier": "cache"}
HELD = {"artifacts": [ROW]}
ON_HOST = {"artifacts": [], "host": {"artifacts": [{"digest": DIGEST, "bytes": 64, "tier": "host"}]}}
MERGING = {"artifacts": [], "host": None, "merging": [{"digest": DIGEST}]}
FAILED = {"artifacts": [], "failures": {DIGEST: "rank 512 is too high"}}
EMPTY = {"artifacts": [], "merging": [], "failures": {}}


def described(workers, artifact=None, digest=DIGEST) -> dict:
    names = {"a": Name("a", "recipe", digest, "a@dddd" if digest else "", "" if digest else "no such adapter")}
    front = SimpleNamespace(artifacts={DIGEST: artifact} if artifact else {})
    (row,) = describe_names(front, Current(SimpleNamespace(names=SimpleNamespace(names=names)), workers))
    return row


@pytest.mark.parametrize(
    ("workers", "state"),
    [
        ([HELD, HELD], "ready"),
        ([HELD, ON_HOST], "ready"),
        ([HELD, EMPTY], "cold"),
        ([HELD, MERGING], "preparing"),
        ([FAILED, EMPTY], "failed"),
        ([HELD, {"error": "the worker is gone"}], "cold"),
    ],
    ids=["everywhere", "one in host memory", "on one of two", "one merges", "one failed", "one is gone"],
)
def test_ready_means_every_worker(workers, state):
    row = described(workers)
    assert row["state"] == state
    assert (row["reason"] is not None) == (state == "failed")


def test_facts_come_with_what_is_ready():
    row = described([HELD])
    assert {key: row[key] for key in ("rank", "bytes", "seconds", "tier")} == {
        k: v for k, v in ROW.items() if k != "digest"
    }


def test_a_name_without_an_artifact_says_why():
    row = described([HELD], digest=None)
    assert (row["state"], row["reason"], row["artifact"]) == ("failed", "no such adapter", None)


def test_a_failure_that_only_this_process_knows_of_is_told():
    artifact = SimpleNamespace(state="failed", reason="not ready within 600 s")
    assert described([EMPTY], artifact)["reason"] == "not ready within 600 s"
    assert described([EMPTY], SimpleNamespace(state="ready", reason=""))["state"] == "cold"
