"""The mailbox between the engine thread and the event loop: order, coalescing, endings, bounds."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
from tests.turboserve.api.scripted import USAGE

from turboserve.api import mailbox as module
from turboserve.api.mailbox import Mailbox
from turboserve.errors import EngineFailureError
from turboserve.messages import Failed, Finished, ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta


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


def test_deltas_are_merged_only_where_they_continue_each_other() -> None:
    one, two = TokenLogprob("a", b"a", -1.0), TokenLogprob("b", b"b", -2.0)

    async def scenario() -> None:
        mailbox = Mailbox()
        for delta in (
            ReasoningDelta("hm"),
            ReasoningDelta("m"),
            TextDelta("a", (one,)),
            TextDelta("b", (two,)),
            ToolCallDelta(0, "call_0", "f", ""),
            ToolCallDelta(0, arguments="{"),
            ToolCallDelta(0, arguments="}"),
            ToolCallDelta(1, "call_1", "f", "{}"),
            TextDelta("c"),
        ):
            mailbox.put(delta)
        mailbox.put(Finished("tool_calls", USAGE))
        assert [await mailbox.next() for _ in range(6)] == [
            ReasoningDelta("hmm"),
            TextDelta("ab", (one, two)),
            ToolCallDelta(0, "call_0", "f", "{}"),
            ToolCallDelta(1, "call_1", "f", "{}"),
            TextDelta("c"),
            Finished("tool_calls", USAGE),
        ]

    asyncio.run(scenario())


def test_unread_logprobs_are_bounded_too() -> None:
    one = TokenLogprob("a", b"a", -1.0, top=(TokenLogprob("a", b"a", -1.0),) * 20)

    async def scenario() -> None:
        mailbox = Mailbox()
        for _ in range(module.MAX_PENDING_CHARS // (20 * module.LOGPROB_CHARS)):
            mailbox.put(TextDelta("a", (one,)))
        assert isinstance((await drain(mailbox))[1], Failed)

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
