"""One server with a key and the embedded model, and a headless Chromium that looks at its page.

Each test has a tab of its own, with nothing kept; what the browser complains about on the console fails it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.dashboard.browser import FLAGS, NAMES, WIDE, chromium
from tests.e2e.server import Server, running_server

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

KEY = "a key of the tests"
COMPLAINTS = ("error", "warning")
TIMEOUT_MS = 60_000  # generous: the suite may run on a loaded machine


@dataclass
class Tab:
    """A page that is open, what its console said, and what it loaded."""

    page: Any  # playwright's Page
    url: str
    complaints: list[str] = field(default_factory=list)
    loaded: list[Any] = field(default_factory=list)  # playwright's Responses

    def open(self, path: str = "/") -> None:
        self.page.goto(self.url + path)

    def say(self, text: str) -> None:
        """Type a message, send it with Enter and wait for the whole answer."""
        before = self.page.locator(".message.assistant").count()
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")
        self.page.locator(".message.assistant").nth(before).locator(".actions").wait_for()

    def texts(self, selector: str) -> list[str]:
        """Of all that match, with ordinary blanks."""
        return [text.replace("\N{NO-BREAK SPACE}", " ") for text in self.page.locator(selector).all_inner_texts()]

    def text(self, selector: str) -> str:
        (text,) = self.texts(selector)
        return text

    def facts(self, selector: str) -> dict[str, str]:
        """A definition list by its terms."""
        return dict(zip(self.texts(f"{selector} dt"), self.texts(f"{selector} dd"), strict=True))


# Per module: while Playwright runs, its event loop does, and other tests' asyncio.run would refuse to.
@pytest.fixture(scope="module")
def server(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Not started where no browser would look at it."""
    bounds = ("--max-context-tokens", "2048", "--default-max-tokens", "64", "--prefill-chunk-tokens", "64")
    with running_server(tmp_path_factory.mktemp("cache"), "--kv-format", "4/3", "--api-key", KEY, *bounds) as running:
        yield running


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = chromium()
    if program is None:
        pytest.skip(f"no Chromium on this machine (none of {', '.join(NAMES)}; CHROMIUM can name one)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def new_tab(server: Server, browser: Any) -> Iterator[Any]:
    """Opens tabs: `new_tab(key=None, **what Playwright's new_context takes)`."""
    contexts, tabs = [], []

    def opened(key: str | None = KEY, **options: Any) -> Tab:
        context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
        context.set_default_timeout(TIMEOUT_MS)
        if key is not None:
            context.add_init_script(f"sessionStorage.setItem('turboserve.key', {key!r})")
        tab = Tab(context.new_page(), server.url)
        tab.page.on("console", lambda said: tab.complaints.extend([said.text] if said.type in COMPLAINTS else ()))
        tab.page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        tab.page.on("response", lambda reply: tab.loaded.append(reply))
        contexts.append(context)
        tabs.append(tab)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert [complaint for tab in tabs for complaint in tab.complaints] == []


@pytest.fixture
def tab(new_tab: Any) -> Tab:
    """The page, opened at its wide layout."""
    opened: Tab = new_tab()
    opened.open()
    return opened


@pytest.fixture
def emptied(api: httpx.Client) -> None:
    """The server holds no conversation."""
    while page := api.get("/v1/sessions?limit=100").json()["data"]:
        for session in page:
            api.delete(f"/v1/sessions/{session['id']}")
