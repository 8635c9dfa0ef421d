"""The page's files and live data: who is shown what, and what a browser may do with them."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from playwright.async_api import Page, async_playwright

from services.gateway.backend import TokenEvent
from services.gateway.http.face import HttpFace
from services.gateway.http.page.files import PATHS
from services.gateway.http.page.live import Live, Requests, State, WorkerState
from tests.browser import CHROMIUM, FLAGS, needs_chromium
from tests.security.http_keys import client_of, entry, face_with_keys
from tests.unit.gateway_fakes import FakeBackend, running_face, says

FOLDER = Path(__file__).parents[2] / "services" / "gateway" / "http" / "page"
KEYS = (entry("alice"), entry("root", operator=True))
STATE = State(
    gateway="gateway.7",
    model="demo",
    requests=Requests(running=1, waiting=2, ended=3, tokens=4),
    ttft=None,
    tpot=None,
    workers=[WorkerState("decode.1", "decode", "draining", 5, 0, 64, 0, 0.0)],
    stores=[],
)


class FixedLive(Live):
    """Says always the same."""

    def __init__(self) -> None:
        pass

    def state(self) -> State:
        return STATE


async def test_the_page_needs_no_key_and_its_data_an_operators() -> None:
    async with face_with_keys(FakeBackend(), *KEYS, live=FixedLive()) as (face, _):
        async with client_of(face) as http:
            for path in PATHS:
                assert (await http.get(path)).status_code == 200, path
            assert (await http.get("/debug/live")).status_code == 401
            assert (await http.get("/page/index.html")).status_code == 401
            assert (await http.get("/page/../page/live.py")).status_code == 401
        async with client_of(face, "alice") as http:
            assert (await http.get("/debug/live")).status_code == 403
        async with client_of(face, "root") as http:
            answer = await http.get("/debug/live")
            assert answer.json()["workers"][0]["state"] == "draining"
            assert answer.headers["cache-control"] == "no-store"


async def test_a_browser_may_load_nothing_but_the_pages_own_files() -> None:
    async with running_face(FakeBackend()) as face, client_of(face) as http:
        kinds = set()
        for path in PATHS:
            headers = (await http.get(path)).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            kinds.add(headers["content-type"].partition(";")[0])
        assert kinds == {"text/html", "text/css", "text/javascript"}
        page = (await http.get("/")).text
        links = re.findall(r'(?:href|src)="(page/[^"]+)"', page)
        assert {f"/{link}" for link in links} == {"/page/page.css", "/page/page.js"}


def test_nothing_in_the_files_is_from_elsewhere_or_in_line() -> None:
    for path in FOLDER.glob("*.*"):
        if path.suffix == ".py":
            continue
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*$|//.*$", "", text, flags=re.MULTILINE), path.name
        assert not re.search(r"https?:|innerHTML|eval\(|localStorage|sessionStorage|cookie", text)
        if path.suffix == ".html":
            assert not re.search(r"\s(?:style|on\w+)=", text)
            assert not re.search(r"<script(?![^>]*src=)", text)


@pytest.mark.parametrize("options", [{}, {"include_worker": True}])
async def test_chunks_tell_who_made_them_where_that_is_asked_for(options: dict[str, bool]) -> None:
    def script(_request: object) -> list[TokenEvent]:
        return [msgspec.structs.replace(event, worker="decode.3") for event in says("one two")]

    async with running_face(FakeBackend(script)) as face, client_of(face) as http:
        body = {"prompt": "x", "stream": True, "stream_options": options}
        text = (await http.post("/v1/completions", json=body)).text
    events = text.split("\n\n")[:-2]  # the last is [DONE]
    chunks = [msgspec.json.decode(event.removeprefix("data: ")) for event in events]
    assert len(chunks) == len(says("one two"))
    told = {"worker": "decode.3"} if options else None
    assert all(chunk.get("kvbaton") == told for chunk in chunks)


async def status(page: Page, words: str) -> None:
    await page.locator("#status", has_text=words).wait_for(timeout=20_000)


@needs_chromium
async def test_a_key_is_asked_for_and_kept_nowhere() -> None:
    backend = FakeBackend(lambda _request: says("one two"))
    async with (
        face_with_keys(backend, *KEYS, live=FixedLive()) as (face, _),
        async_playwright() as playwright,
    ):
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = await browser.new_page()
            await use_keys(page, face)
            assert await page.context.storage_state() == {"cookies": [], "origins": []}
            await page.reload()
            await status(page, "needs a key")
        finally:
            await browser.close()


async def use_keys(page: Page, face: HttpFace) -> None:
    """A wrong key, one of a tenant, an operator's."""

    async def use(key: str) -> None:
        await page.get_by_role("textbox", name="API key").fill(key)
        await page.get_by_role("textbox", name="API key").press("Enter")

    await page.goto(f"http://127.0.0.1:{face.port}/")
    await status(page, "needs a key")
    await use("wrong")
    await status(page, "this key is not known")
    await use("alice")
    await status(page, "only an operator's key shows the cluster")
    await page.get_by_role("button", name="Send").click()
    await page.locator("#try-status", has_text="done").wait_for()
    assert "one two" in await page.get_by_role("region", name="Output", exact=True).inner_text()
    await use("root")
    await status(page, "live")
    assert not await page.get_by_role("textbox", name="API key").is_visible()
    assert "demo at gateway.7" in await page.inner_text("header")
    assert "draining" in await page.get_by_role("region", name="Decode", exact=True).inner_text()


@pytest.mark.parametrize("name", ["page.js", "live.js", "prompt.js", "waterfall.js"])
def test_every_file_that_is_imported_is_served(name: str) -> None:
    imports = re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text())
    assert imports
    assert {f"/page/{each}" for each in imports} <= PATHS
