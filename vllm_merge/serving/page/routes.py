# SPDX-License-Identifier: Apache-2.0
"""The files of the page. They hold no data: the page asks the routes under /v1/merge, with the keys that its reader types in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

router = APIRouter(tags=["merge"])

STATIC = Path(__file__).parent / "static"
File = Literal["page.css", "page.js", "api.js", "elements.js", "experiments.js", "plot.js", "server.js"]
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@router.get("/merge", include_in_schema=False)
async def without_slash(request: Request) -> Response:
    """The page's own links are relative."""
    return RedirectResponse(f"{request.scope.get('root_path', '')}/merge/", headers=_HEADERS)


@router.get("/merge/", summary="A page that shows what is served", response_class=Response)
async def page() -> Response:
    """HTML without any data in it. Everything it shows comes from the routes under /v1/merge."""
    return _file("index.html")


@router.get("/merge/{file}", include_in_schema=False)
async def part(file: File) -> Response:
    """A file that the page consists of."""
    return _file(file)


def _file(name: str) -> Response:
    media_type = f"{_TYPES[Path(name).suffix]}; charset=utf-8"
    return Response(_content(name), media_type=media_type, headers=_HEADERS)


@cache
def _content(name: str) -> bytes:
    return (STATIC / name).read_bytes()
