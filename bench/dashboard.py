"""What an open dashboard costs: a core's share in the browser, with many conversations held, and its weight.

    PYTHONPATH=. python bench/dashboard.py --json dashboard.json
    PYTHONPATH=. python bench/dashboard.py --sessions 50 --seconds 20

A real server with the embedded model holds --sessions named conversations. A headless Chromium of the system has the
page open at 1440 x 900; its renderer's processor time is read at both ends of --seconds, once while nothing is asked
and once while one conversation after the other is answered. Needs playwright (the extra `test`).
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from _rows import Row, add_json_option, print_rows, write_rows
from _servers import Served, turboserve
from playwright.sync_api import Browser, Page, sync_playwright
from tests.dashboard.browser import FLAGS, WIDE, chromium

MAX_SHARE = 0.05
MAX_PAGE_BYTES = 300_000
SETTLE_S = 6.0  # the page has drawn everything, the tree too
TOPICS = ["lists", "files", "tables", "strings", "classes", "tests", "dates", "queues"]


def converse(served: Served, name: str, turn: int) -> None:
    """One short answer in the session of this name."""
    question = f"You answer briefly.\nTell me something about {TOPICS[turn % len(TOPICS)]}, please: {name}."
    reply = served.ask([{"role": "user", "content": question}], 16, session_id=name)
    if reply.error:
        raise SystemExit(f"{name}: {reply.error}")


def renderer_s(browser: Browser) -> float:
    """Processor seconds of all renderers since their start."""
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return float(sum(one["cpuTime"] for one in processes if one["type"] == "renderer"))


def share(browser: Browser, page: Page, seconds: float) -> float:
    """Of one core, over so many seconds."""
    before, started = renderer_s(browser), time.perf_counter()
    page.wait_for_timeout(seconds * 1000)
    return (renderer_s(browser) - before) / (time.perf_counter() - started)


def measured(served: Served, program: str, num_sessions: int, seconds: float) -> list[Row]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        page = browser.new_page(viewport=WIDE)
        loaded: list[Any] = []
        page.on("response", lambda reply: loaded.append(reply))
        page.goto(served.url)
        page.wait_for_timeout(SETTLE_S * 1000)
        shown = page.locator(".leaf").count()
        if shown != min(num_sessions, 100):
            raise SystemExit(f"the page shows {shown} conversations of {num_sessions}")
        files = [reply for reply in loaded if "/v1/" not in reply.url and not reply.url.endswith("/metrics")]
        sent = sum(reply.request.sizes()["responseBodySize"] for reply in files)
        plain = sum(len(reply.body()) for reply in files)
        quiet = share(browser, page, seconds)
        stopped = threading.Event()
        others = threading.Thread(target=_keep_asking, args=(served, num_sessions, stopped))
        others.start()
        busy = share(browser, page, seconds)
        stopped.set()
        others.join()
        browser.close()
    return [
        Row.at_most(f"renderer, {num_sessions} sessions held", quiet, "core", MAX_SHARE),
        Row.at_most("renderer, others being answered", busy, "core", MAX_SHARE),
        Row.at_most("page as sent (gzip)", sent, "bytes", MAX_PAGE_BYTES, plain),
        Row.at_most("page unpacked", plain, "bytes", MAX_PAGE_BYTES),
    ]


def _keep_asking(served: Served, num_sessions: int, stopped: threading.Event) -> None:
    turn = 1
    while not stopped.is_set():
        converse(served, f"live-{turn % num_sessions}", turn)
        turn += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    add_json_option(parser)
    args = parser.parse_args()
    program = chromium()
    if program is None:
        raise SystemExit("no Chromium on this machine; CHROMIUM can name one")
    with tempfile.TemporaryDirectory() as cache_dir, turboserve(Path(cache_dir)) as served:
        for number in range(args.sessions):
            converse(served, f"live-{number}", 0)
        held = httpx.get(f"{served.url}/v1/kv/stats", timeout=60).json()["num_conversations"]
        print(f"held: {held}")
        rows = measured(served, program, args.sessions, args.seconds)
    print_rows(rows)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
