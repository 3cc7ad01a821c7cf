"""The mailbox between the engine thread and the event loop: order, coalescing, endings, bounds."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import numpy as np
import pytest
from tests.turboserve.api.conftest import Ask
from tests.turboserve.api.scripted import USAGE

from turboserve.api import mailbox as module
from turboserve.api.mailbox import Mailbox
from turboserve.errors import EngineFailureError
from turboserve.messages import Delta, Event, Failed, Finished, ReasoningDelta, TextDelta, TokenLogprob, ToolCallDelta


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


@pytest.mark.parametrize("interval_s", [0.0, 3600.0])
@pytest.mark.parametrize("num_open", [module.FEW_STREAMS, module.FEW_STREAMS + 1])
def test_many_streams_get_their_tokens_together(num_open: int, interval_s: float) -> None:
    """Beginnings and ends at once; what lies between, of many streams, when the interval is over."""
    waits = num_open > module.FEW_STREAMS and interval_s > 0

    async def scenario() -> None:
        mailboxes = [Mailbox(interval_s) for _ in range(num_open)]

        async def read(mailbox: Mailbox, text: str) -> Event | None:
            reading = asyncio.ensure_future(mailbox.next())
            await asyncio.sleep(0)
            mailbox.put(TextDelta(text))
            done, _ = await asyncio.wait({reading}, timeout=0.1 if waits and text != "first" else 60)
            if done:
                return reading.result()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            return None

        assert [await read(one, "first") for one in mailboxes] == [TextDelta("first")] * num_open
        expected = None if waits else TextDelta("second")
        assert [await read(one, "second") for one in mailboxes] == [expected] * num_open
        reading = asyncio.ensure_future(mailboxes[0].next())
        await asyncio.sleep(0)
        mailboxes[0].put(Finished("stop", USAGE))
        assert await asyncio.wait_for(reading, 60) == (TextDelta("second") if waits else Finished("stop", USAGE))
        for one in (*mailboxes, mailboxes[0]):
            one.close()
        last = Mailbox(interval_s)  # alone again
        assert await read(last, "first") == TextDelta("first")
        assert await asyncio.wait_for(_put_and_read(last), 60) == TextDelta("more")

    asyncio.run(scenario())


def test_held_tokens_come_with_the_interval_and_once() -> None:
    async def scenario() -> None:
        mailboxes = [Mailbox(0.05) for _ in range(module.FEW_STREAMS + 1)]
        texts = [""] * len(mailboxes)
        num_events = 0

        async def read(place: int) -> None:
            nonlocal num_events
            while isinstance(event := await mailboxes[place].next(), TextDelta):
                texts[place] += event.text
                num_events += 1

        readers = [asyncio.ensure_future(read(i)) for i in range(len(mailboxes))]
        words = [chr(97 + i % 26) for i in range(200)]
        for word in words:
            await asyncio.sleep(0.001)
            for mailbox in mailboxes:
                mailbox.put(TextDelta(word))
        for mailbox in mailboxes:
            mailbox.put(Finished("stop", USAGE))
        await asyncio.wait_for(asyncio.gather(*readers), 60)
        assert texts == ["".join(words)] * len(mailboxes)
        assert num_events < len(words) * len(mailboxes) / 2

    asyncio.run(scenario())


class Exit:
    """An outlet that can be closed, or be broken."""

    def __init__(self) -> None:
        self.is_open, self.fault = True, ""
        self.taken: list[Delta] = []

    def take(self, delta: Delta) -> None:
        if self.fault:
            raise ValueError(self.fault)
        self.taken.append(delta)


async def _turns(num: int = 5) -> None:
    for _ in range(num):
        await asyncio.sleep(0)


def test_an_open_outlet_takes_deltas_and_the_reader_sleeps_on_until_the_end() -> None:
    async def scenario() -> None:
        mailbox, outlet = Mailbox(), Exit()
        mailbox.put(TextDelta("before"))
        assert await mailbox.next(60, outlet) == TextDelta("before"), "what has come before the call is the reader's"
        reading = asyncio.ensure_future(mailbox.next(60, outlet))
        await _turns()
        mailbox.put(TextDelta("a"))
        await _turns()
        for delta in (TextDelta("b"), TextDelta("c"), ReasoningDelta("d")):
            mailbox.put(delta)
        await _turns()
        assert outlet.taken == [TextDelta("a"), TextDelta("bc"), ReasoningDelta("d")] and not reading.done()
        outlet.is_open = False
        mailbox.put(TextDelta("e"))
        assert await reading == TextDelta("e")
        reading = asyncio.ensure_future(mailbox.next(60, outlet))
        await _turns()
        outlet.is_open = True
        mailbox.put(TextDelta("f"))
        mailbox.put(Finished("stop", USAGE))
        assert await reading == Finished("stop", USAGE) and outlet.taken[3:] == [TextDelta("f")]

    asyncio.run(scenario())


def test_what_an_outlet_raises_is_raised_to_the_reader() -> None:
    async def scenario() -> None:
        mailbox, outlet = Mailbox(), Exit()
        reading = asyncio.ensure_future(mailbox.next(60, outlet))
        await _turns()
        outlet.fault = "broken"
        mailbox.put(TextDelta("a"))
        with pytest.raises(ValueError, match="broken"):
            await reading

    asyncio.run(scenario())


def test_silence_is_noticed_behind_an_outlet_too() -> None:
    async def scenario() -> None:
        mailbox, outlet = Mailbox(), Exit()
        reading = asyncio.ensure_future(mailbox.next(0.05, outlet))
        await _turns()
        mailbox.put(TextDelta("a"))
        assert await reading is None and outlet.taken == [TextDelta("a")]

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_wakes_its_task_for_its_beginning_and_its_end_alone(
    monkeypatch: pytest.MonkeyPatch, ask: Ask, stream: bool
) -> None:
    num_asked = 0
    whole = Mailbox.next

    async def counting(mailbox: Mailbox, *args: Any) -> Event | None:
        nonlocal num_asked
        num_asked += 1
        return await whole(mailbox, *args)

    monkeypatch.setattr(Mailbox, "next", counting)
    assert "99 " in ask("burst", stream=stream).text
    assert num_asked == 2


class Timers(asyncio.SelectorEventLoop):
    """An event loop that remembers when it is to call, in seconds from now."""

    def __init__(self) -> None:
        super().__init__()
        self.due_s: list[float] = []

    def call_at(self, *args: object, **options: object) -> asyncio.TimerHandle:
        self.due_s.append(cast(float, args[0]) - self.time())
        return super().call_at(*args, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [1, 3])
def test_so_many_streams_that_wakings_would_grow_wait_longer(times: int) -> None:
    interval_s = 1e8  # longer than any machine has been up: times count from its start

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Timers)
        mailboxes = [Mailbox(interval_s) for _ in range(times * module.MANY_STREAMS)]
        for _ in range(2):
            for mailbox in mailboxes:
                mailbox.put(TextDelta("x"))
            await _turns()
            assert [await mailbox.next() for mailbox in mailboxes] == [TextDelta("x")] * len(mailboxes)
        (due_s,) = loop.due_s
        assert (times - 1) * interval_s < due_s <= times * interval_s

    with asyncio.Runner(loop_factory=Timers) as runner:
        runner.run(scenario())


async def _put_and_read(mailbox: Mailbox) -> Event | None:
    reading = asyncio.ensure_future(mailbox.next())
    await asyncio.sleep(0)
    mailbox.put(TextDelta("more"))
    return await reading
