# SPDX-License-Identifier: Apache-2.0
"""A played server behind a real socket and a real browser in front of it; and the pictures of the page for the docs:

python -m tests.serving.page_browser docs/images
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn

from tests.serving import played_server as play
from tests.serving.played_server import TOKEN, PlayedServer, patched, played_server, recipe_file

EXPERIMENT = {
    "arms": {"m0": 50, "m1": 50},
    "unit": "user",
    "alias": "assistant",
    "primary": {"metric": "score"},
    "guardrails": [{"metric": "errors", "max": 0.5}],
}
USERS = 240


def browser_path() -> str | None:
    """A browser that Playwright can drive, if one is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextlib.asynccontextmanager
async def server_with_page(folder: Path) -> AsyncIterator[tuple[PlayedServer, str]]:
    """The server and the page's address."""
    config = recipe_file(folder, experiments={"greeting": EXPERIMENT})
    with patched(play, SLOTS=4):
        async with played_server(config, STORE=f"{folder}/experiments.db") as server:
            web = uvicorn.Server(uvicorn.Config(server.apis[0].app, port=0, log_level="error", lifespan="off"))
            serving = asyncio.create_task(web.serve())
            await server.until(lambda: web.started)
            port = web.servers[0].sockets[0].getsockname()[1]
            try:
                yield server, f"http://127.0.0.1:{port}/merge"
            finally:
                web.should_exit = True
                await serving


async def users_like_m1(server: PlayedServer) -> None:
    """Requests of many users, and scores that are better for m1."""
    outcomes = []
    for user in range(USERS):
        answer = await server.ask("greeting", user=f"user-{user}")
        assert answer.status_code == 200, answer.text
        better = answer.headers["x-vllm-merge-arm"] == "m1"
        score = (0.9 if better else 0.1) + 0.05 * (user % 3)
        outcomes.append({"response_id": answer.headers["x-vllm-merge-exposure"], "metric": "score", "score": score})
    sent = await server.apis[0].client.post("/v1/merge/outcomes", json={"outcomes": outcomes})
    assert sent.status_code == 200, sent.text
    writer = server.apis[0].app.state.vllm_merge_experiments.writer
    await server.until(lambda: writer.waiting == 0)


@contextlib.asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            await chromium.close()


async def sign_in(page: Any, address: str) -> None:
    """Open the page and give it the admin token, by the keyboard alone."""
    await page.goto(address)
    await page.locator("#keys").focus()
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await page.keyboard.type(TOKEN)
    await page.keyboard.press("Enter")
    await page.get_by_role("button", name="Promote").wait_for()


async def _pictures(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        async with server_with_page(Path(folder)) as (server, address), browser() as chromium:
            await users_like_m1(server)
            for name, scheme, width in (("page", "light", 1280), ("page-phone", "dark", 390)):
                size = {"width": width, "height": 900}
                page = await chromium.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
                await sign_in(page, address)
                await page.locator("svg.plot").wait_for()
                await page.screenshot(path=str(target / f"{name}.png"), full_page=width > 500)
                await page.close()


if __name__ == "__main__":
    asyncio.run(_pictures(Path(sys.argv[1])))
