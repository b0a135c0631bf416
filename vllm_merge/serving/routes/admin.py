# SPDX-License-Identifier: Apache-2.0
"""Who may change what a server serves: whoever sends the token of VLLM_MERGE_ADMIN_TOKEN, beside vLLM's API key.

Without the variable nobody may: the routes that change things are not there (plugin.py).
"""

from __future__ import annotations

import secrets
from typing import Annotated

from fastapi import Header

from vllm_merge.serving.routes.route_errors import RouteError
from vllm_merge.serving.settings import ADMIN_TOKEN_VARIABLE, admin_token

ADMIN_HEADER = "x-vllm-merge-admin-token"


def is_admin(token: str | None) -> bool:
    """Whether this is the right token; never where none is configured."""
    right = admin_token()
    return right is not None and secrets.compare_digest((token or "").encode(), right.encode())


def require_admin(
    token: Annotated[
        str | None, Header(alias=ADMIN_HEADER, description=f"The token of {ADMIN_TOKEN_VARIABLE}.")
    ] = None,
) -> None:
    """A dependency of admin routes. Raises RouteError: 404 where no token is configured, 403 without the right one."""
    if admin_token() is None:
        raise RouteError(404, f"admin routes are off; start the server with {ADMIN_TOKEN_VARIABLE} set to a token")
    if not is_admin(token):
        raise RouteError(403, f"this needs the header {ADMIN_HEADER} with the token of {ADMIN_TOKEN_VARIABLE}")
