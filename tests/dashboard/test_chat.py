"""Talking: typed and streamed, stopped, edited, forked; a key asked for once; hostile texts that stay texts."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import numpy as np
from tests.dashboard.conftest import KEY, Tab

WORDS = [
    "list",
    "dictionary",
    "tuple",
    "string",
    "file",
    "loop",
    "join",
    "sort",
    "table",
    "index",
    "query",
    "class",
    "page",
]
HOSTILE = [
    "<script>window.hit = 1</script>",
    "<img src=x onerror='window.hit = 1'>",
    "<svg onload='window.hit = 1'><a xlink:href='javascript:window.hit=1'>x</a></svg>",
    "[press](javascript:window.hit=1) and [data](data:text/html,<script>window.hit=1</script>)",
    "![picture](http://127.0.0.1:9/secret.png) <iframe srcdoc='<script>parent.hit=1</script>'></iframe>",
    "```html\n<script>window.hit = 1</script>\n```",
    "<form action='http://127.0.0.1:9/'><input name=q><button>x</button></form><style>*{display:none}</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hit=1>",
    "<a href='JaVaScRiPt:window.hit=1' style='position:fixed;inset:0' id='input'>x</a><base href='http://127.0.0.1:9/'>",
    "| a | b |\n|---|---|\n| <b onmouseover='window.hit=1'>x</b> | &lt;script&gt;window.hit=1&lt;/script&gt; |",
]


def question(rng: np.random.Generator) -> str:
    return f"What is a {rng.choice(WORDS)} {rng.choice(WORDS)} {rng.integers(1000)}?"


def sessions(api: httpx.Client) -> dict[str, dict[str, Any]]:
    """By id, once nothing runs."""
    deadline = time.monotonic() + 60
    while api.get("/v1/kv/stats").json()["requests"] != {"running": 0, "waiting": 0}:
        assert time.monotonic() < deadline, "still busy"
        time.sleep(0.05)
    return {session["id"]: session for session in api.get("/v1/sessions?limit=100").json()["data"]}


def test_a_question_is_typed_and_its_answer_streams_in(tab: Tab, api: httpx.Client, rng: np.random.Generator) -> None:
    asked = question(rng)
    growing: list[str] = []
    tab.page.expose_function("grew", lambda text: growing.append(text))
    tab.page.evaluate(
        "new MutationObserver(() => grew([...document.querySelectorAll('.message.assistant')].at(-1)?.innerText ?? ''))"
        ".observe(document.querySelector('#messages'), { childList: true, subtree: true })"
    )
    tab.say(asked)
    assert tab.texts(".message.user .text") == [asked]
    (answer,) = tab.texts(".message.assistant .text")
    assert answer.strip()

    def parts() -> set[str]:
        return {text for text in growing if text.strip() and "first after" not in text}

    for _ in range(5):  # a browser that has to wait for a processor draws an answer's pieces at once
        if len(parts()) > 1:
            break
        growing.clear()
        tab.say(question(rng))
    assert len(parts()) > 1, "answers come in one piece"
    name = tab.page.url.rpartition("#")[2]
    held = sessions(api)[name]
    assert held["tier"] == "memory" and held["explicit"]
    assert f"of {held['tokens'] - 1}" not in answer
    figures = tab.texts(".message.assistant .figures")[0]
    assert "from cache" in figures and "4/3" in figures

    tab.page.reload()  # the text is the browser's
    assert tab.texts(".message.user .text")[:1] == [asked]
    assert tab.texts(".message.assistant .text")[:1] == [answer]


def test_an_answer_can_be_stopped(tab: Tab, api: httpx.Client, rng: np.random.Generator) -> None:
    tab.page.fill("#input", " ".join(rng.choice(WORDS, 900)))  # takes seconds to read
    tab.page.press("#input", "Enter")
    tab.page.click("#stop")
    tab.page.locator(".message.assistant .note", has_text="Stopped").wait_for()
    assert tab.page.locator("#send").is_visible() and not tab.page.locator("#stop").is_visible()
    sessions(api)  # comes back because nothing runs any more
    tab.page.click("#new-chat")
    tab.say(question(rng))


def test_a_fork_shares_what_came_before_and_an_edit_begins_anew(
    tab: Tab, api: httpx.Client, rng: np.random.Generator, emptied: None
) -> None:
    asked = [question(rng) for _ in range(4)]
    tab.say(asked[0])
    tab.say(asked[1])
    first = tab.page.url.rpartition("#")[2]
    tab.page.locator(".message.assistant").nth(0).get_by_role("button", name="Fork the conversation here").click()
    tab.page.wait_for_url(lambda url: not url.endswith(first))
    fork = tab.page.url.rpartition("#")[2]
    assert tab.texts(".message.user .text") == asked[:1]
    assert set(sessions(api)) == {first, fork}
    tab.say(asked[2])
    cached = tab.texts(".message.assistant .figures")[-1].split(" prompt tokens from cache")[0].split(" · ")[-1]
    assert int(cached.split(" of ")[0]) > 0
    tree = api.get("/v1/kv/tree").json()
    assert {session["id"] for session in tree["sessions"]} == {first, fork}
    shared = [node for node in tree["nodes"] if any(other["parent"] is not None for other in tree["nodes"])]
    assert shared and max(node["tokens"] for node in tree["nodes"] if not node["sessions"]) > 10

    tab.page.locator(f"[data-chat={first}]").click()
    assert tab.texts(".message.user .text") == asked[:2]
    tab.page.locator(".message.user").nth(0).get_by_role("button", name="Edit and send again").click()
    tab.page.fill(".message.user textarea", asked[3])
    tab.page.get_by_role("button", name="Send again", exact=True).click()
    tab.page.locator(".message.user", has_text=asked[3]).wait_for()
    tab.page.locator(".message.assistant .figures").wait_for()
    assert tab.texts(".message.user .text") == [asked[3]]
    assert tab.page.locator(".message.assistant").count() == 1
    assert len(sessions(api)) == 2


def test_texts_that_want_to_run_are_only_shown(new_tab: Any, rng: np.random.Generator) -> None:
    """As answers, thoughts, questions, calls and titles: kept ones, because a model cannot be made to write them."""
    order = [HOSTILE[i] for i in rng.permutation(len(HOSTILE))]
    said = [
        message
        for text in order
        for message in (
            {"role": "user", "content": text},
            {
                "role": "assistant",
                "content": text,
                "thinking": text,
                "calls": [{"id": text, "name": text, "arguments": text}],
                "state": "failed",
                "error": text,
            },
        )
    ]
    chat = {"id": "ui-0", "title": order[0], "model": "", "format": "", "settings": {}, "at": 0, "messages": said}
    tab = new_tab()
    tab.page.add_init_script(
        f"localStorage.setItem('turboserve.chat.ui-0', {json.dumps(json.dumps(chat))});"
        "window.refused = []; addEventListener('securitypolicyviolation', (e) => refused.push(e.blockedURI))"
    )
    asked_for: list[str] = []
    tab.page.on("request", lambda request: asked_for.append(request.url))
    tab.open("/#ui-0")
    tab.page.locator(".message.assistant").nth(len(order) - 1).wait_for()
    for summary in tab.page.locator("summary").all():
        summary.click()
    assert tab.page.evaluate("[window.hit ?? null, refused]") == [None, []]
    assert [url for url in asked_for if not url.startswith(tab.url)] == []
    inside = ".messages :is(script, iframe, img, style, form[action], input, base, math, object, embed, link)"
    assert tab.page.locator(inside).count() == 0
    attributes = tab.page.evaluate(
        "[...document.querySelectorAll('.message .text *')]"
        ".flatMap((e) => [...e.attributes].map((a) => a.name + '=' + a.value))"
    )
    assert not [one for one in attributes if one.startswith(("on", "style=", "id=")) or "javascript:" in one.lower()]
    shown = tab.texts(".message.assistant > .body > .text")
    plain = order.index(HOSTILE[0])
    assert shown[plain].strip() == HOSTILE[0], "the reader sees what was written"
    assert tab.texts(".message.user .text") == [" ".join(text.split()) if "\n" not in text else text for text in order]


def test_what_markdown_hides_is_shown_as_it_was_said(new_tab: Any) -> None:
    said = ["[a]: http://there.example/", "#", "-", "```", "[](http://there.example/)", "---"]
    messages = [{"role": "assistant", "content": text, "thinking": "", "calls": [], "state": "done"} for text in said]
    chat = {"id": "ui-0", "title": "", "model": "", "format": "", "settings": {}, "at": 0, "messages": messages}
    tab = new_tab()
    tab.page.add_init_script(f"localStorage.setItem('turboserve.chat.ui-0', {json.dumps(json.dumps(chat))})")
    tab.open("/#ui-0")
    tab.page.locator(".message.assistant").nth(len(said) - 1).wait_for()
    assert [text.strip() for text in tab.texts(".message.assistant > .body > .text")] == said


def test_the_key_is_asked_for_once_and_kept_in_the_tab(new_tab: Any, rng: np.random.Generator) -> None:
    tab = new_tab(key=None)
    tab.open()
    dialog = tab.page.locator("#key-dialog")
    dialog.wait_for()
    assert {reply.status for reply in tab.loaded} == {200}, "nothing had to be refused first"
    tab.page.fill("#key", "wrong")
    tab.page.press("#key", "Enter")
    tab.page.locator("#key-problem").wait_for()
    tab.page.fill("#key", KEY)
    tab.page.press("#key", "Enter")
    tab.page.locator("#hero-line", has_text=" in ").wait_for()
    refused = [complaint for complaint in tab.complaints if "401" in complaint]
    assert refused == tab.complaints, "what Chromium says of a refused request"
    tab.complaints.clear()
    tab.say(question(rng))
    tab.page.reload()
    tab.page.locator("#hero-line", has_text=" in ").wait_for()
    assert not dialog.is_visible()
    kept = tab.page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
    assert KEY in kept[0] and KEY not in kept[1] and kept[2] == ""


def test_calls_and_their_results(tab: Tab, rng: np.random.Generator) -> None:
    words = [str(word) for word in rng.choice(WORDS, 3, replace=False)]
    parameters = {"type": "object", "properties": {"word": {"enum": words}}, "required": ["word"]}
    function = {"name": "look_up", "parameters": {**parameters, "additionalProperties": False}}
    tab.page.click("#tune")
    tab.page.fill("#set-tools", json.dumps([{"type": "function", "function": function}]))
    tab.page.select_option("#set-tool-choice", "required")
    tab.say(question(rng))
    call = tab.page.locator("details.call")
    assert "look_up" in call.inner_text() and not call.locator("pre").is_visible()
    call.locator("summary").click()
    assert json.loads(call.locator("pre").inner_text())["word"] in words
    tab.page.select_option("#set-tool-choice", "none")
    tab.page.fill(".results textarea", "It means a thing.")
    tab.page.get_by_role("button", name="Send results").click()
    tab.page.locator(".message.assistant .figures").nth(1).wait_for()
    assert tab.texts(".message.tool .text") == ["It means a thing."]
