"""The page in a browser, before a real cluster: it loads, updates, streams, and can be used by all.

With KVBATON_PAGE_SCREENSHOT=docs/page.png and `-k picture --timeout 900` its picture is taken, with
the demo model at work.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import CHROMIUM, FLAGS, needs_chromium
from tests.cluster import processes

SCREENSHOT = os.environ.get("KVBATON_PAGE_SCREENSHOT", "")
MOCK: dict[str, Any] = {"engine": "mock", "mock_step_ms": 5}
TIMEOUT_MS = 20_000

pytestmark = needs_chromium


class Site(NamedTuple):
    """A cluster and a browser to look at it with."""

    browser: Browser
    url: str


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    worker = {"mover": "zmq"} | ({} if SCREENSHOT else MOCK)
    folder = tmp_path_factory.mktemp("page")
    with (
        # Four models take a while to load on a busy machine, and the picture is worth the wait.
        patch.object(processes, "_START_S", 300.0 if SCREENSHOT else processes._START_S),
        processes.running(folder, num_prefill=2, num_decode=2, worker=worker) as cluster,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Site(browser, cluster.base_url)
        browser.close()


@contextmanager
def opened(site: Site, *, allowed: str = "", **options: Any) -> Iterator[Page]:
    """The page, live. Whatever else than `allowed` the browser complains about fails the test."""
    complaints: list[str] = []
    context = site.browser.new_context(viewport={"width": 1240, "height": 900}, **options)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        page.goto(site.url)
        expect(page.locator("#status")).to_have_text("live", timeout=TIMEOUT_MS)
        yield page
    finally:
        context.close()
    assert [each for each in complaints if not allowed or allowed not in each] == []


def complete(site: Site, **fields: Any) -> None:
    body = {"prompt": "def add(a, b):\n", "max_tokens": 8, "temperature": 0} | fields
    answer = httpx.post(f"{site.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def region(page: Page, name: str) -> Any:
    return page.get_by_role("region", name=re.compile(f"^{name}"))


def test_it_shows_the_pools_and_what_happens_to_requests(site: Site) -> None:
    with opened(site) as page:
        for role in ("Prefill", "Decode"):
            rows = region(page, role).get_by_role("listitem")
            expect(rows).to_have_count(2)
            expect(rows.first).to_contain_text(f"{role.lower()}.1 ready")
        expect(region(page, "KV blocks")).to_contain_text("Store 0 up")
        before = page.locator("#waterfall details").count()
        complete(site, ttft_target_ms=60_000)
        rows = page.locator("#waterfall details")
        expect(rows).to_have_count(before + 1, timeout=TIMEOUT_MS)
        expect(region(page, "Time to first token")).to_contain_text("within target")
        expect(region(page, "Time to first token")).to_contain_text("Target 60.0 s, met by 100 %")
        rows.first.locator("summary").focus()
        page.keyboard.press("Enter")
        for stage in ("prefill:", "handoff:", "decode:"):
            expect(rows.first.locator(".stages")).to_contain_text(stage)
        complete(site)
        expect(rows).to_have_count(before + 2, timeout=TIMEOUT_MS)
        assert rows.nth(1).get_attribute("open") is not None, "an open one stays open"


def test_a_prompts_tokens_show_who_made_them(site: Site) -> None:
    with opened(site) as page:
        page.get_by_role("textbox", name="Prompt").fill("class Stack:\n")
        page.get_by_label("Tokens", exact=True).fill("12")
        page.get_by_role("button", name="Send").press("Enter")
        expect(page.locator("#try-status")).to_contain_text("done: 12 tokens")
        first, second = page.locator("#output .token").all()[:2]
        assert re.fullmatch(r"made by prefill\.[12]", first.get_attribute("title") or "")
        assert re.fullmatch(r"made by decode\.[12]", second.get_attribute("title") or "")
        looks = [
            token.evaluate("each => getComputedStyle(each).textDecorationStyle")
            for token in (first, second)
        ]
        assert looks[0] != looks[1], "not told apart by colour alone"
        names = page.get_by_role("list", name="Who made the tokens").get_by_role("listitem")
        expect(names).to_have_count(2)


def test_an_answer_can_be_stopped(site: Site) -> None:
    with opened(site) as page:
        page.get_by_label("Tokens", exact=True).fill("2000")
        page.get_by_role("button", name="Send").click()
        page.locator("#output .token").nth(5).wait_for(state="attached")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#try-status")).to_contain_text("stopped: ")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_a_refused_prompt_says_why(site: Site) -> None:
    with opened(site, allowed="status of 400") as page:
        page.get_by_role("textbox", name="Prompt").fill("")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#try-status")).to_contain_text("failed: prompt")
        expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_nothing_is_asked_while_nobody_looks(site: Site) -> None:
    with opened(site) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        see(page, "hidden")
        page.wait_for_timeout(200)  # what was asked before may end
        asked.clear()
        page.wait_for_timeout(1500)
        assert asked == []
        with page.expect_request("**/debug/live"):
            see(page, "visible")


def see(page: Page, state: str) -> None:
    page.evaluate(
        """state => {
          Object.defineProperty(document, "visibilityState", { value: state, configurable: true });
          document.dispatchEvent(new Event("visibilitychange"));
        }""",
        state,
    )


def test_everything_has_a_name_and_keys_reach_it(site: Site) -> None:
    with opened(site) as page:
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("section,input,textarea,button,[role=meter]")]
              .filter((each) => !(
                each.getAttribute("aria-label") || each.textContent.trim() || each.labels?.length
                || each.getAttribute("aria-labelledby")
              )).map((each) => each.outerHTML)"""
        )
        assert unnamed == []
        assert page.get_by_role("meter").count() == 4
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
        page.keyboard.press("Enter")
        reached = []
        for _ in range(5):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("() => document.activeElement.id"))
        assert reached[:4] == ["max-tokens", "temperature", "send", "output"]
        assert page.evaluate("() => document.documentElement.lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(site: Site, scheme: Any) -> None:
    """By 4.5 to 1, as WCAG 2 asks for, in both schemes; and they are two."""
    with opened(site, color_scheme=scheme) as page:
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert (luminance(ground) > 0.5) == (scheme == "light")
        pairs = page.evaluate(
            """() => {
              const ground = (each) => {
                for (; each; each = each.parentElement) {
                  const colour = getComputedStyle(each).backgroundColor;
                  if (colour.startsWith("rgb(")) return colour;
                }
              };
              return [...document.querySelectorAll("main *, header *")]
                .filter((each) => [...each.childNodes].some((node) =>
                  node.nodeType === Node.TEXT_NODE && node.textContent.trim()))
                .filter((each) => each.checkVisibility() && !each.disabled)
                .map((each) => [getComputedStyle(each).color, ground(each), each.textContent]);
            }"""
        )
        assert len(pairs) > 20
        dim = [pair for pair in pairs if contrast(*pair[:2]) < 4.5]
        assert dim == []


def luminance(colour: str) -> float:
    """Relative luminance of an "rgb(r, g, b)", WCAG 2."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(not SCREENSHOT, reason="KVBATON_PAGE_SCREENSHOT is not set")
def test_its_picture_is_taken(site: Site) -> None:
    is_over = threading.Event()

    def keep_busy(number: int) -> None:
        prompt = f"# Number {number}\n" + "def add(a, b):\n    return a + b\n\n" * (4 + 6 * number)
        while not is_over.is_set():
            targets = {"ttft_target_ms": 2500, "tpot_target_ms": 150}
            complete(site, prompt=prompt, max_tokens=48 + 16 * number, **targets)

    threads = [threading.Thread(target=keep_busy, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        with opened(site, color_scheme="light", device_scale_factor=1.5) as page:
            page.wait_for_timeout(20_000)
            page.get_by_role("button", name="Send").click()
            expect(page.locator("#try-status")).to_contain_text("done", timeout=60_000)
            page.locator("#waterfall summary").nth(1).click()
            page.screenshot(path=Path(SCREENSHOT), full_page=True)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
