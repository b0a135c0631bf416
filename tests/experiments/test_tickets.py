# SPDX-License-Identifier: Apache-2.0
"""Response ids that carry their arm, and nobody can make but the server."""

import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from vllm_merge.errors import UserInputError
from vllm_merge.experiments import tickets
from vllm_merge.experiments.tickets import Ticket, find_key, read_ticket

TICKET = Ticket("0123456789abcdef" * 2, "assistant-ab", 3, "support-v2", "f" * 32)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(tickets.KEY_VARIABLE, "a key for tests, long enough")
    tickets.signing_key.cache_clear()
    yield
    tickets.signing_key.cache_clear()


@pytest.mark.parametrize("ticket", [TICKET, Ticket("a" * 32, "e", 1, "a.b_c-d", counted=False)])
@pytest.mark.parametrize("shape", ["{}", "chatcmpl-{}", "cmpl-{}-0", "resp_{}"])
def test_an_id_gives_its_ticket_back(ticket, shape):
    assert read_ticket(shape.format(ticket.sign())) == ticket


def test_nothing_of_it_can_be_changed():
    text = TICKET.sign()
    for i in range(len(text)):
        other = "0" if text[i] != "0" else "1"
        changed = read_ticket(text[:i] + other + text[i + 1 :])
        assert changed is None, f"{text[i]!r} at {i} was changed to {other!r}"


@pytest.mark.parametrize("text", ["", "chatcmpl-4f2c", "vm1~~~~~~~", "~" * 2000, "x" * 100_000])
def test_other_ids_have_none(text):
    assert read_ticket(text) is None


def test_another_key_s_ticket_is_none(monkeypatch):
    text = TICKET.sign()
    monkeypatch.setenv(tickets.KEY_VARIABLE, "another key, long enough")
    tickets.signing_key.cache_clear()
    assert read_ticket(text) is None


def test_without_a_key_processes_that_start_together_make_one_that_stays(tmp_path):
    environment = {"VLLM_MERGE_STORE": str(tmp_path / "new" / "store.sqlite")}
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: find_key(environment), range(32)))
    assert len(keys) == 1
    assert keys == {find_key(environment)}
    (file,) = (tmp_path / "new").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert find_key({"VLLM_MERGE_STORE": str(tmp_path / "other.sqlite")}) not in keys


def test_replicas_with_one_postgresql_store_have_one_key():
    url = "postgresql://u:{}@{}/db"
    one, two = (find_key({"VLLM_MERGE_STORE": url.format("secret", host)}) for host in ("a", "b"))
    assert one == two != find_key({"VLLM_MERGE_STORE": url.format("another", "a")})


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"VLLM_MERGE_SIGNING_KEY": "short"}, "VLLM_MERGE_SIGNING_KEY has 5 characters; give at least 16"),
        (
            {"VLLM_MERGE_STORE": "postgresql://u@h/db"},
            "has no password to derive a key from; set VLLM_MERGE_SIGNING_KEY",
        ),
        ({"VLLM_MERGE_STORE": "/dev/null/store"}, "cannot be kept: .*; set VLLM_MERGE_SIGNING_KEY"),
    ],
)
def test_no_key_says_what_to_do(environment, says):
    with pytest.raises(UserInputError, match=says):
        find_key(environment)
