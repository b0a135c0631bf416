# SPDX-License-Identifier: Apache-2.0
"""Who may change what a server serves: whoever sends the token of VLLM_MERGE_ADMIN_TOKEN, beside vLLM's API key.

Without the variable nobody may: the routes that change things answer 404.
"""

from __future__ import annotations

import secrets

from fastapi import HTTPException, Request

from vllm_merge.serving.settings import ADMIN_TOKEN_VARIABLE, admin_token

ADMIN_HEADER = "x-vllm-merge-admin-token"


def require_admin(request: Request) -> None:
    """A dependency of admin routes. Raises HTTPException: 404 where no token is configured, 403 without the right one."""
    token = admin_token()
    if token is None:
        raise HTTPException(404, f"admin routes are off; start the server with {ADMIN_TOKEN_VARIABLE} set to a token")
    given = request.headers.get(ADMIN_HEADER, "")
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise HTTPException(403, f"this needs the header {ADMIN_HEADER} with the token of {ADMIN_TOKEN_VARIABLE}")
