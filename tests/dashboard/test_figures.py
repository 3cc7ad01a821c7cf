"""The figures at the side are the server's own; the page is small, fits a phone, and can be used without seeing it."""

from __future__ import annotations

import time
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from tests.dashboard.browser import PHONE, WIDE
from tests.dashboard.conftest import Tab
from tests.dashboard.test_chat import question

UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
MAX_PAGE_BYTES = 300_000


def as_bytes(text: str) -> float:
    """`1.24 MB` as a number."""
    number, unit = text.split()
    return float(number) * UNITS[unit]


def about(value: float) -> Any:
    """What three digits can say."""
    return pytest.approx(value, rel=6e-3, abs=0.5)


def settled(tab: Tab, api: httpx.Client) -> tuple[dict[str, Any], dict[str, Any]]:
    """Statistics and tree once the page has had time to show them: they do not change meanwhile."""
    deadline = time.monotonic() + 60
    while True:
        before = api.get("/v1/kv/stats").json()
        tab.page.wait_for_timeout(2500)  # longer than the page waits between two looks
        after = api.get("/v1/kv/stats").json()
        if before["kv_bytes"] == after["kv_bytes"] and after["requests"] == {"running": 0, "waiting": 0}:
            return after, api.get("/v1/kv/tree").json()
        assert time.monotonic() < deadline, "the server does not come to rest"


def test_what_is_shown_is_what_the_server_says(
    tab: Tab, api: httpx.Client, rng: np.random.Generator, emptied: None
) -> None:
    said = "\n".join(question(rng) for _ in range(30))  # long enough for pages
    for name in ("one", "two"):
        asked = {"messages": [{"role": "user", "content": said}], "max_tokens": 4 + int(rng.integers(8))}
        api.post("/v1/chat/completions", json=asked, headers={"X-Session-Id": name}).raise_for_status()
    tab.say(question(rng))
    stats, tree = settled(tab, api)
    held, half = stats["kv_bytes"]["total"], stats["raw_equivalent_bytes"] / 2  # the embedded model runs in float32
    num = stats["num_conversations"]
    line, _, size = tab.text("#hero-line").partition(" in ")
    assert line == f"{num['memory']} conversations" and num == {"running": 0, "memory": 3, "disk": 0}
    assert as_bytes(size) == about(held)
    sub = tab.text("#hero-sub").removeprefix("FP16 would need ").replace(":", ",").partition(",")[0]
    assert as_bytes(sub) == about(half)

    facts = tab.facts("#hero-facts")
    assert facts["Tokens held"] == f"{stats['tokens']:,}" and facts["In memory"] == "3"
    assert as_bytes(facts["Budget"]) == about(stats["kv_budget_bytes"])
    needed, now = tab.text("#read-memory").split(" · ")
    assert as_bytes(needed.removeprefix("FP16 would need ")) == about(half)
    assert as_bytes(now.removeprefix("held ")) == about(held)
    events = tab.facts("#events")
    assert events["Evicted"] == f"{sum(stats['events']['evictions'].values()):,}"
    assert events["Spilled to disk"] == f"{sum(stats['events']['spills'].values()):,}"

    shown = dict(zip(tab.texts(".held-name"), tab.texts(".held-figure"), strict=True))
    assert len(shown) == len(tree["sessions"]) == 3
    for name in ("one", "two"):
        (session,) = [one for one in tree["sessions"] if one["id"] == name]
        size, _, tokens = shown[name].partition(", ")
        assert as_bytes(size) == about(session["kv_bytes"]["total"]) and tokens == f"{session['tokens']:,} tokens"
        assert session["pages"]["shared"] == session["pages"]["compressed"] > 0, "both begin with the same pages"
    (own,) = [one for one in tree["sessions"] if one["id"] not in ("one", "two")]
    this = tab.facts("#this")
    assert (this["Tokens"], this["Exact tokens"]) == (f"{own['tokens']:,}", f"{own['pages']['exact_tokens']:,}")
    assert tab.page.locator(".leaf").count() == 3
    drawn = tab.page.evaluate(
        "[...document.querySelectorAll('.plot canvas')].map((c) => "
        "c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v > 0))"
    )
    assert drawn == [True, True, True]


def test_the_page_weighs_little(new_tab: Any) -> None:
    tab = new_tab()
    tab.open()
    tab.page.locator("#hero-line", has_text=" in ").wait_for()
    assets = [reply for reply in tab.loaded if reply.url.rstrip("/") == tab.url or "/dashboard/" in reply.url]
    assert len(assets) >= 20
    plain = sum(len(reply.body()) for reply in assets)
    sent = sum(reply.request.sizes()["responseBodySize"] for reply in assets)
    print(f"{len(assets)} files, {sent:,} bytes sent, {plain:,} unpacked")
    assert sent < plain < MAX_PAGE_BYTES  # gzip, and even without it
    assert all(reply.header_value("content-security-policy") for reply in assets)


VIEWS = ("chats", "chat", "memory")


def fits(tab: Tab) -> bool:
    wide: bool = tab.page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && "
        "[...document.querySelectorAll('.scroll, .panel-scroll, .side nav')]"
        ".every((e) => e.scrollWidth <= e.clientWidth)"
    )
    return wide


def test_a_phone_needs_no_sideways_scrolling(new_tab: Any, rng: np.random.Generator) -> None:
    tab = new_tab(viewport=PHONE, has_touch=True)
    tab.open()
    tab.page.locator(".suggestion").first.wait_for()
    assert fits(tab)
    tab.page.click("#tune")
    assert fits(tab)
    tab.page.click("#tune")
    tab.say("x" * int(rng.integers(200, 300)) + " " + question(rng))  # a word that is wider than the screen
    tab.page.wait_for_timeout(300)
    for view in VIEWS:
        tab.page.click(f"[data-goto={view}]")
        assert fits(tab), view


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_nothing_serious_stands_in_the_way(
    new_tab: Any, theme: str, size: dict[str, int], rng: np.random.Generator
) -> None:
    """axe-core's verdict, with an answer on the page and every view in turn."""
    tab = new_tab(viewport=size, color_scheme=theme)
    tab.open()
    tab.say(question(rng))
    tab.page.locator(".leaf").first.wait_for(state="attached")
    for view in VIEWS if size is PHONE else ("chat",):
        if size is PHONE:
            tab.page.click(f"[data-goto={view}]")
        found = Axe().run(tab.page).response["violations"]
        serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert serious == []


def test_keys_alone_are_enough(tab: Tab, rng: np.random.Generator) -> None:
    tab.page.keyboard.type(question(rng))  # the field has the focus from the start
    tab.page.keyboard.press("Enter")
    tab.page.locator(".message.assistant .actions").wait_for()
    tab.page.keyboard.press("Alt+n")
    assert tab.page.locator(".message").count() == 0
    tab.page.keyboard.press("Alt+ArrowDown")
    assert tab.page.locator(".message").count() == 2
    tab.page.keyboard.press("Alt+e")
    assert tab.page.locator("textarea.edit").is_visible()
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("textarea.edit").is_visible()
