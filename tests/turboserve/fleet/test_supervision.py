"""Loading on demand, making room, unloading, crashes and bad starts, with scripts for models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
from tests.turboserve.fleet.conftest import WAIT_S, Clock, Start, wait_until


def test_a_model_is_loaded_by_the_first_request_and_once(start: Start) -> None:
    router = start({"a": {}, "b": {}}, {"a": {"waits": True}})
    assert router.starts("a") == 0
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(router.ask, "a") for _ in range(6)]
        wait_until(lambda: router.fleet["a"].num_waiting == 6)
        router.go()
        replies = [one.result() for one in asked]
    assert [reply.json()["by"] for reply in replies] == ["a"] * 6
    assert (router.starts("a"), router.starts("b")) == (1, 0)
    assert router.get("/v1/models/a").json()["max_model_len"] == 4096
    assert [one["status"] for one in router.get("/v1/models").json()["data"]] == ["loaded", "unloaded"]


def test_a_pinned_model_is_loaded_at_start_and_stays(start: Start) -> None:
    router = start({"a": {"pinned": True, "idle_unload_s": 0.2}, "b": {"idle_unload_s": 0.2}})
    router.wait_for("a", "loaded")
    router.ask("b")
    router.wait_for("b", "unloaded")
    assert router.status("a") == "loaded"
    assert (router.starts("a"), router.starts("b")) == (1, 1)


def test_the_least_recently_used_idle_model_makes_room(start: Start) -> None:
    router = start({"a": {}, "b": {}, "c": {}})  # two of them fit
    for name in ("a", "b", "a", "c"):
        assert router.ask(name).json()["by"] == name
    assert [router.status(name) for name in "abc"] == ["loaded", "unloaded", "loaded"]
    assert router.fleet["b"].events["evictions"] == 1


def test_a_model_in_use_is_never_stopped_for_another(start: Start) -> None:
    router = start({"a": {"memory": 600_000_000}, "b": {"memory": 600_000_000}}, {"a": {"waits": True}})
    router.go()
    router.ask("a")
    router.go_file.unlink()
    with httpx.stream(
        "POST",
        f"{router.url}/v1/chat/completions",
        json={"model": "a", "stream": True, "do": "stream"},
        timeout=WAIT_S,
    ) as answer:
        chunks = answer.iter_raw()
        next(chunks)
        refused = router.ask("b")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert "No memory now" in refused.json()["error"]["message"]
        router.go()
        assert b"".join(chunks).endswith(b"data: [DONE]\n\n")
    assert router.ask("b").json()["by"] == "b"  # idle by now: it made way
    assert router.status("a") == "unloaded"


def test_a_model_larger_than_the_budget_says_so(start: Start) -> None:
    router = start({"a": {"memory": 2_000_000_000}, "b": {}})
    refused = router.ask("a")
    assert refused.status_code == 503
    assert "models_memory is 954 MiB" in refused.json()["error"]["message"]
    assert router.ask("b").status_code == 200


def test_a_bad_start_is_told_and_left_alone_for_a_while(start: Start, clock: Clock) -> None:
    router = start({"bad": {}, "good": {}}, {"bad": {"complaint": "There is no folder x: check the path."}})
    first = router.ask("bad")
    assert first.status_code == 503
    assert first.json()["error"]["code"] == "model_unavailable"
    assert "There is no folder x: check the path." in first.json()["error"]["message"]
    again = router.ask("bad")
    assert again.status_code == 503
    assert "There is no folder x" in again.json()["error"]["message"]
    assert router.starts("bad") == 1  # the second came within the back-off
    assert router.ask("good").status_code == 200
    shown = router.get("/v1/models/bad").json()
    assert (shown["status"], shown["error"]) == ("failed", "There is no folder x: check the path.")
    clock.now_s += 1.0
    router.ask("bad")
    assert router.starts("bad") == 2
    assert router.fleet["bad"].backoff.not_before == clock.now_s + 2.0  # twice as long


def test_a_start_that_takes_too_long_is_given_up(start: Start) -> None:
    router = start({"slow": {}}, {"slow": {"waits": True}}, model_start_timeout_s=0.3)
    refused = router.ask("slow")
    assert "not ready within 0.3 s" in refused.json()["error"]["message"]


def test_a_request_waits_for_a_bounded_time_and_the_start_goes_on(start: Start) -> None:
    router = start({"a": {}}, {"a": {"waits": True}}, model_wait_timeout_s=0.2)
    refused = router.ask("a")
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "10"
    told = "The model 'a' is still being loaded. Try again in 10 seconds."
    assert refused.json()["error"]["message"] == told
    router.go()
    router.wait_for("a", "loaded")
    assert router.ask("a").status_code == 200
    assert router.starts("a") == 1


def test_few_requests_wait_for_a_model(start: Start) -> None:
    router = start({"a": {"max_queued": 2}}, {"a": {"waits": True}})
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(router.ask, "a") for _ in range(5)]
        wait_until(lambda: sum(one.done() for one in asked) == 3)
        router.go()
        statuses = sorted(one.result().status_code for one in asked)
    assert statuses == [200, 200, 503, 503, 503]


def test_a_crash_ends_its_requests_only_and_the_next_one_starts_it_again(start: Start) -> None:
    router = start({"a": {}, "b": {}})
    router.ask("a"), router.ask("b")
    lost = router.ask("a", do="die")
    assert lost.status_code == 503
    assert lost.json()["error"]["code"] == "model_unavailable"
    assert router.ask("b").status_code == 200
    assert router.ask("a").json()["by"] == "a"
    assert (router.starts("a"), router.starts("b")) == (2, 1)
    assert router.fleet["a"].events["crashes"] == 1


def test_a_model_that_keeps_crashing_is_left_alone_for_longer(start: Start, clock: Clock) -> None:
    router = start({"a": {}})
    for _ in range(2):
        assert router.ask("a").status_code == 200
        router.kill("a")
        router.wait_for("a", "failed")
    refused = router.ask("a")
    assert refused.status_code == 503
    assert "SIGKILL" in refused.json()["error"]["message"]
    clock.now_s += 1.0
    assert router.ask("a").status_code == 200


def test_a_pinned_model_that_died_is_started_again_without_being_asked(start: Start) -> None:
    router = start({"a": {"pinned": True}})
    router.wait_for("a", "loaded")
    router.kill("a")
    wait_until(lambda: router.starts("a") == 2)
    router.wait_for("a", "loaded")


def test_output_is_passed_on_with_the_model(start: Start) -> None:
    router = start({"bad": {}}, {"bad": {"complaint": "no"}})
    router.ask("bad")
    wait_until(lambda: ("bad", "stderr", "a line before") in router.lines)


def test_a_shutdown_ends_a_model_that_is_still_being_loaded(start: Start) -> None:
    router = start({"a": {"pinned": True}}, {"a": {"waits": True}})
    wait_until(lambda: router.starts("a") == 1)
    assert router.status("a") == "loading"  # the fixture ends the router and looks for processes left over
