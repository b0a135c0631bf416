# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, on a server of which only vLLM's engine is played."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.experiment_records import pair
from tests.serving.page_browser import browser, browser_path, server_with_page, sign_in, users_like_m1
from tests.serving.played_server import PlayedServer, played, recipe_file
from vllm_merge.serving.page.routes import STATIC

pytest.importorskip("playwright", reason="Playwright is not installed")
in_a_browser = pytest.mark.skipif(browser_path() is None, reason="no Chromium is installed")

Scenario = Callable[[PlayedServer, Any, str], Awaitable[None]]


def on_the_page(folder: Path, scenario: Scenario, refused: str = "", **view: Any) -> None:
    """Run a scenario with a page that must not fail, nor ask any host but its own. refused: a status that is expected."""

    async def run() -> None:
        async with server_with_page(folder) as (server, address), browser() as chromium:
            context = await chromium.new_context(**view)
            page = await context.new_page()
            problems: list[str] = []
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
            hosts: set[str | None] = set()
            page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
            await asyncio.wait_for(scenario(server, page, address), 240)
            assert [text for text in problems if not refused or f"status of {refused}" not in text] == []
            assert hosts == {"127.0.0.1"}

    asyncio.run(run())


@in_a_browser
def test_it_shows_an_experiment_and_promotes_the_better_arm(tmp_path: Path) -> None:
    async def scenario(server: PlayedServer, page: Any, address: str) -> None:
        await users_like_m1(server)
        await sign_in(page, address)
        card = page.get_by_role("article", name="Experiment greeting")
        await card.locator("svg.plot polyline.line").wait_for(state="attached")  # a line of one moment has no area
        assert "m1" in await card.locator(".verdict").inner_text()
        row = card.get_by_role("row").filter(has_text="m1@")
        assert "better" in await row.inner_text()
        await card.get_by_label("Arm of greeting to promote").select_option("m1")
        await card.get_by_role("button", name="Promote").click()
        await page.locator("#confirm-reason").fill("<img src=x onerror=alert(1)> it wins")
        await page.locator("#confirm-yes").click()
        await card.get_by_text("promote m1: <img src=x onerror=alert(1)> it wins").wait_for()
        assert await page.locator("img").count() == 0, "what people write is text"
        assert (await server.ask("assistant")).headers["x-vllm-merge-artifact"] == server.label("m1")
        await page.locator("#events li").filter(has_text="experiment:").first.wait_for()
        await card.get_by_role("button", name="Stop").click()
        said = await page.locator("#confirm-text").inner_text()
        assert (
            said == "Everybody who asks for greeting gets m0. The alias assistant stays where the promotion moved it."
        )

    on_the_page(tmp_path, scenario)


@in_a_browser
def test_it_shows_what_two_answers_to_the_same_request_have_in_common(tmp_path: Path) -> None:
    async def scenario(server: PlayedServer, page: Any, address: str) -> None:
        found = [pair(number, "m0", "m1", experiment="greeting") for number in range(60)]
        found.append(pair(60, "m1", "m0", experiment="greeting", outcome="busy"))
        server.published.experiments.store.add_pairs(found)
        await sign_in(page, address)
        card = page.get_by_role("article", name="Experiment greeting")
        shown = card.get_by_role("region", name="m0 and m1 on the same requests: 60 pairs, 1 dropped")
        await shown.wait_for()
        assert "2 (2 to 2)" in await shown.get_by_role("row").filter(has_text="length, m1 − m0").inner_text()

    on_the_page(tmp_path, scenario)


@in_a_browser
def test_it_moves_an_alias_and_steers_artifacts(tmp_path: Path) -> None:
    async def scenario(server: PlayedServer, page: Any, address: str) -> None:
        await sign_in(page, address)
        await page.get_by_label("What assistant stands for").select_option("m2")
        await page.get_by_role("button", name="Move").click()
        await page.locator("#confirm-no").click()
        assert server.published.state.target("assistant") == "m0", "nothing happens before it was confirmed"
        await page.get_by_label("What assistant stands for").select_option("m2")
        await page.get_by_role("button", name="Move").click()
        await page.locator("#confirm-yes").click()
        await page.get_by_role("button", name="Back to m0").wait_for()
        assert server.published.state.target("assistant") == "m2"
        await page.get_by_role("button", name="Back to m0").click()
        await page.locator("#confirm-yes").click()
        await server.until(lambda: server.published.state.target("assistant") == "m0")
        row = page.locator("#artifacts").get_by_role("row").filter(has_text="m2@")
        await row.get_by_role("button", name="Pin").click()
        await row.get_by_role("button", name="Unpin").wait_for()
        (entry,) = [r for r in server.service.store.describe()["artifacts"] if r["name"] == server.label("m2")]
        assert entry["pinned"]

    on_the_page(tmp_path, scenario)


@in_a_browser
def test_a_wrong_token_is_said_and_nothing_can_be_changed_without_one(tmp_path: Path) -> None:
    async def scenario(server: PlayedServer, page: Any, address: str) -> None:
        await page.goto(address)
        await page.locator("#names").get_by_text("m0@").first.wait_for()
        assert await page.get_by_role("button", name="Promote").count() == 0
        await page.locator("#keys").click()
        await page.locator("#admin-token").fill("wrong")
        await page.locator("#use-keys").click()
        await page.get_by_role("button", name="Stop").click()
        await page.locator("#confirm-yes").click()
        await page.locator("#problem:not([hidden])").wait_for()
        assert "x-vllm-merge-admin-token" in await page.locator("#problem").inner_text()
        assert not server.published.state.trials.decisions

    on_the_page(tmp_path, scenario, refused="403")


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(tmp_path: Path, scheme: str) -> None:
    async def scenario(server: PlayedServer, page: Any, address: str) -> None:
        await sign_in(page, address)
        wide = await page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0, "nothing is cut off"
        ground, text = await page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color].map("
            "colour => colour.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"
        )
        assert (ground > text) == (scheme == "light")
        assert abs(ground - text) > 450, "it can be read"

    on_the_page(tmp_path, scenario, viewport={"width": 360, "height": 740}, color_scheme=scheme)


def test_its_files_say_what_a_browser_may_load_and_hold_no_data(tmp_path: Path) -> None:
    async def scenario(server: PlayedServer) -> None:
        client = server.apis[0].client
        moved = await client.get("/merge")
        assert (moved.status_code, moved.headers["location"]) == (307, "/merge/")
        for name in ["", *(path.name for path in STATIC.iterdir() if path.name != "index.html")]:
            answer = await client.get(f"/merge/{name}")
            assert answer.status_code == 200, name
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "m0" not in answer.text
        for name in ("index.html", "routes.py", "..%2froutes.py", "page.css%00", "../../pyproject.toml"):
            assert (await client.get(f"/merge/{name}")).status_code in (404, 422), name

    played(scenario, recipe_file(tmp_path))


def test_it_names_no_other_host() -> None:
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path.name
