"""The mailbox between the engine thread and the event loop: order, coalescing, endings, bounds."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
from tests.turboserve.api.scripted import USAGE

from turboserve.api import mailbox as module
from turboserve.api.mailbox import Mailbox
from turboserve.errors import EngineFailureError
from turboserve.messages import Failed, Finished, TextDelta


async def drain(mailbox: Mailbox) -> tuple[str, Finished | Failed]:
    text = ""
    while isinstance(event := await mailbox.next(5), TextDelta):
        text += event.text
    assert isinstance(event, Finished | Failed)
    return text, event


def test_text_from_another_thread_arrives_complete_and_in_order(rng: np.random.Generator) -> None:
    words = [chr(0x1F600 + int(code)) for code in rng.integers(0, 60, 2000)]

    async def scenario() -> None:
        mailbox = Mailbox()

        def engine() -> None:
            for word in words:
                mailbox.put(TextDelta(word))
            mailbox.put(Finished("stop", USAGE))

        thread = threading.Thread(target=engine)
        thread.start()
        text, ending = await drain(mailbox)
        thread.join()
        assert text == "".join(words) and ending == Finished("stop", USAGE)

    asyncio.run(scenario())


def test_unread_text_is_one_event() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        for _ in range(100):
            mailbox.put(TextDelta("ab"))
        assert await mailbox.next() == TextDelta("ab" * 100)
        assert await mailbox.next(0.01) is None

    asyncio.run(scenario())


def test_the_first_ending_is_the_only_one() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        failed = Failed(EngineFailureError("gone"))
        mailbox.put(failed)
        mailbox.put(TextDelta("late"))
        mailbox.put(Finished("stop", USAGE))
        assert await mailbox.next() is failed and await mailbox.next() is failed
        assert not mailbox.finished

    asyncio.run(scenario())


def test_an_unread_megabyte_ends_the_request() -> None:
    async def scenario() -> None:
        mailbox = Mailbox()
        for _ in range(3):
            mailbox.put(TextDelta("x" * (module.MAX_PENDING_CHARS // 2)))
        text, ending = await drain(mailbox)
        assert isinstance(ending, Failed) and len(text) < 2 * module.MAX_PENDING_CHARS

    asyncio.run(scenario())


def test_putting_after_the_loop_has_closed_does_not_raise() -> None:
    async def make() -> Mailbox:
        return Mailbox()

    mailbox = asyncio.run(make())
    mailbox.put(TextDelta("x"))
    mailbox.put(Finished("stop", USAGE))
    assert mailbox.finished
