# SPDX-License-Identifier: Apache-2.0
"""Admin routes open for the token alone, and are not there without one."""

from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

from fastapi import HTTPException

from vllm_merge.serving.admin import ADMIN_HEADER, require_admin
from vllm_merge.serving.settings import ADMIN_TOKEN_VARIABLE


@pytest.mark.parametrize(
    ("token", "given", "status"),
    [
        (None, None, 404),
        (None, "x", 404),
        ("", "", 404),
        ("secret", None, 403),
        ("secret", "", 403),
        ("secret", "secreT", 403),
        ("secret", "secret", None),
    ],
)
def test_the_token_opens_and_nothing_else(monkeypatch, token, given, status):
    monkeypatch.delenv(ADMIN_TOKEN_VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(ADMIN_TOKEN_VARIABLE, token)
    request = SimpleNamespace(headers={} if given is None else {ADMIN_HEADER: given})
    if status is None:
        require_admin(request)
        return
    with pytest.raises(HTTPException) as refused:
        require_admin(request)
    assert refused.value.status_code == status
