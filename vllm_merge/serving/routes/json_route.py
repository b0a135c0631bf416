# SPDX-License-Identifier: Apache-2.0
"""Routes whose body is JSON whatever its content type says, as /v1/merge/outcomes takes it: curl's -d calls every body a form.

What changes anything needs the admin token in a header, so a content type guards nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders


class JsonRoute(APIRoute):
    """`route_class` of routers whose routes take JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            scope = dict(request.scope)
            MutableHeaders(scope=scope)["content-type"] = "application/json"
            return await handler(Request(scope, request.receive))

        return handle
