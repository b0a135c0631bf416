# SPDX-License-Identifier: Apache-2.0
"""Admin routes open for the token alone, and are not there without one."""

import pytest

pytest.importorskip("fastapi", reason="vLLM is not installed")

from vllm_merge.serving.routes.admin import require_admin
from vllm_merge.serving.routes.route_errors import RouteError
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
    if status is None:
        require_admin(given)
        return
    with pytest.raises(RouteError) as refused:
        require_admin(given)
    assert refused.value.status == status
