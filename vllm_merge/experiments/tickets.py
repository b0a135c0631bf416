# SPDX-License-Identifier: Apache-2.0
"""Signed response ids: what an outcome needs to know of its exposure, so that it joins even if the exposure was lost.

    vm1~EXPOSURE~EXPERIMENT~VERSION~ARM~UNIT~COUNTED~MAC        HMAC-SHA256 over all before it, 128 bits, base64url

The id that the client sees may have words before and after it (`chatcmpl-…`, `cmpl-…-0`). Names hold no `~`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_merge.errors import UserInputError
from vllm_merge.experiments.database import store_url
from vllm_merge.recipe.values import NAME

KEY_VARIABLE = "VLLM_MERGE_SIGNING_KEY"
MIN_KEY = 16  # characters

_TICKET = re.compile(
    rf"(?P<signed>vm1~(?P<exposure>[0-9a-f]{{32}})~(?P<experiment>{NAME.pattern})~(?P<version>[0-9]{{1,9}})"
    rf"~(?P<arm>{NAME.pattern})~(?P<unit>[0-9a-f]{{32}}|)~(?P<counted>[01]))~(?P<mac>[A-Za-z0-9_-]{{22}})"
)
_MOST_TEXT = 1000  # characters of an id that are looked at


@dataclass(frozen=True)
class Ticket:
    """exposure: its id, 32 hex digits. unit: hashed, "" where the request is its own. counted: the lot chose the arm."""

    exposure: str
    experiment: str
    version: int
    arm: str
    unit: str = ""
    counted: bool = True

    def sign(self) -> str:
        """The text of it."""
        counted = int(self.counted)
        text = f"vm1~{self.exposure}~{self.experiment}~{self.version}~{self.arm}~{self.unit}~{counted}"
        return f"{text}~{_mac(text)}"


def read_ticket(text: str) -> Ticket | None:
    """The ticket in a response's id or exposure header; None where there is none, or one that was not signed here."""
    found = _TICKET.search(text[:_MOST_TEXT])
    if found is None or not hmac.compare_digest(_mac(found["signed"]), found["mac"]):
        return None
    return Ticket(
        found["exposure"],
        found["experiment"],
        int(found["version"]),
        found["arm"],
        found["unit"],
        found["counted"] == "1",
    )


def _mac(text: str) -> str:
    digest = hmac.digest(signing_key(), text.encode(), "sha256")
    return base64.urlsafe_b64encode(digest[:16]).rstrip(b"=").decode()


@cache
def signing_key() -> bytes:
    """The key of all processes of a server. Raises UserInputError where there is none."""
    return find_key(os.environ)


def find_key(environment: Mapping[str, str]) -> bytes:
    """VLLM_MERGE_SIGNING_KEY; else a file beside an SQLite store, made once; else from the password in the store's URL.

    Each is the same after a restart, and in every process that uses the store. Raises UserInputError.
    """
    given = environment.get(KEY_VARIABLE)
    if given is not None:
        if len(given) < MIN_KEY:
            raise UserInputError(
                f"{KEY_VARIABLE} has {len(given)} characters; give at least {MIN_KEY}, chosen at random"
            )
        return hashlib.sha256(given.encode()).digest()
    url = store_url(environment=environment)
    if url.get_backend_name() == "sqlite":
        return _key_file(Path(f"{url.database}.key"))
    if not url.password:
        raise UserInputError(
            f"the store's URL has no password to derive a key from; set {KEY_VARIABLE}, on all replicas alike"
        )
    return hashlib.sha256(f"tickets\0{url.database}\0{url.password}".encode()).digest()


def _key_file(path: Path) -> bytes:
    """What the file holds. Processes that start together make it once."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
                stream.write(secrets.token_hex(32).encode())
            try:
                os.link(beside, path)  # fails where another process was first
            except FileExistsError:
                pass
            finally:
                beside.unlink()
        key = path.read_bytes().strip()
    except OSError as error:
        raise UserInputError(
            f"{path}: the key of response ids cannot be kept: {error.strerror}; set {KEY_VARIABLE}"
        ) from None
    if len(key) < MIN_KEY:
        raise UserInputError(f"{path}: holds no key; remove it, and the next start makes one")
    return hashlib.sha256(key).digest()
